"""A choice of bits by layer: named rules, and the file that takes it to the next quantiser."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from olive.errors import ConfigError
from olive.models.quantised import HEAD, Layer
from olive.passes.quantize.targets import CHOICE, Override, number_of

_INPUTS = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"})
OUTPUTS = frozenset({"down_proj", "fc2", "w2", "dense_4h_to_h"})
_CHOICES = TypeAdapter(dict[str, Override])


def preset(algorithm: str, names: Iterable[str], count: int) -> set[str]:
    """Layers that a rule of llama.cpp's k-quants gives more bits.

    Args:
        algorithm: ``k_quant_last``: the head; ``k_quant_down``: and the MLPs' outputs in the first and last
            eighth of the decoder layers and in every third between; ``k_quant_mixed``: and the attention's
            inputs there.
        names: of the layers.
        count: decoder layers.
    """
    kinds = {"k_quant_last": frozenset[str](), "k_quant_down": OUTPUTS, "k_quant_mixed": _INPUTS | OUTPUTS}
    return {name for name in names if name == HEAD or _rich(name, count, kinds[algorithm])}


def _rich(name: str, count: int, kinds: frozenset[str]) -> bool:
    number = number_of(name)
    if number is None or name.rpartition(".")[2] not in kinds:
        return False
    outer = 8 * number < count or 8 * number >= 7 * count
    return outer or (number - count // 8) % 3 == 2


def overrides(choice: Mapping[str, Layer]) -> dict[str, Override]:
    """A choice as the next quantiser takes it."""
    return {
        name: Override(bits=one.bits, group_size=one.group_size, symmetric=one.symmetric)
        for name, one in choice.items()
    }


def write(folder: Path, choice: Mapping[str, Override]) -> None:
    """Put a choice beside a model; it is part of the folder's digest."""
    body = {name: one.model_dump(exclude_none=True) for name, one in choice.items()}
    (folder / CHOICE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Override]:
    """The choice beside a model; empty where there is none.

    Raises:
        ConfigError: the file is no choice of settings by layer.
    """
    try:
        return _CHOICES.validate_json((folder / CHOICE).read_bytes())
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise ConfigError(
            f"{CHOICE} of the model is no table of bits by layer: {error.errors()[0]['msg']}",
            fix="Run SelectiveMixedPrecision again, or remove the file.",
        ) from error
