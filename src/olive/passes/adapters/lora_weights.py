"""What a LoRA adapter on disk adds to which tensor of its base.

The formula is that of Hu et al. 2021 (arXiv:2106.09685) with the rank-stabilised scale of Kalajdzievski 2023
(arXiv:2312.03732); the layout on disk is that of PEFT's ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA with a bias of its own",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable single tokens",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing",
}
# These start from a changed base, which is not stored: the base on disk plus B A is not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Delta:
    """One low-rank change.

    Attributes:
        target: name of the base tensor that changes.
        a, b: names of the two factors in the adapter's file.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` when rank-stabilised.
        transposed: the base stores the weight as (in, out).
    """

    target: str
    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read but not loaded.

    Attributes:
        folder: where it lies.
        config: its adapter_config.json.
        deltas: base tensor name -> change.
        replaced: base tensor name -> name of the tensor in the adapter that takes its place.
        foreign: tensors of the adapter that fit no scheme known here.
    """

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    @property
    def targets(self) -> set[str]:
        """Every base tensor that the adapter changes."""
        return {*self.deltas, *self.replaced}


def unsupported(config: dict[str, Any]) -> str | None:
    """What in an adapter's config cannot be merged by ``W + s B A`` alone, in words; None when nothing."""
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        return f"a {kind} adapter"
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGES_BASE):
        return f"LoRA that started from a changed base (init_lora_weights {start})"
    return next((words for key, words in _UNSUPPORTED.items() if config.get(key)), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        PassFailed: there is none, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PassFailed(
            f"the adapter has no readable {CONFIG}: {error}", fix="Train the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise PassFailed(f"{path} is not a JSON object", fix="Train the adapter again.")
    return config


def read(folder: Path) -> Adapter:
    """Read what the adapter in ``folder`` changes; no tensor is loaded.

    Raises:
        PassFailed: no adapter there, a kind of adapter that needs more than ``W + s B A``, or half a pair.
    """
    from safetensors import SafetensorError, safe_open

    config = read_config(folder)
    if found := unsupported(config):
        raise PassFailed(f"the adapter is {found}; MergeAdapterWeights merges LoRA and rsLoRA")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PassFailed(
            f"the adapter's {WEIGHTS} does not load: {error}", fix="Train the adapter again."
        ) from error
    adapter = Adapter(folder, config)
    foreign: list[str] = []
    halves: dict[str, dict[str, str]] = {}
    for name in shapes:
        base = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(base)
        if base == name:
            foreign.append(name)
        elif match is None:
            adapter.replaced[base.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
        else:
            module = f"{match['module']}\0{'embedding' if match['embedding'] else ''}"
            halves.setdefault(module, {})[match["part"]] = name
    for module, pair in halves.items():
        name, _, embedding = module.partition("\0")
        if set(pair) != {"A", "B"}:
            raise PassFailed(
                f"the adapter has only {sorted(pair.values())} of {name}", fix="Train the adapter again."
            )
        rank = shapes[pair["A"]][0]
        if len(shapes[pair["A"]]) != 2 or rank == 0:
            raise PassFailed(
                f"{pair['A']} has shape {shapes[pair['A']]}; a linear layer's factor has two axes"
            )
        target = f"{name}.weight"
        adapter.deltas[target] = Delta(
            target,
            pair["A"],
            pair["B"],
            _scale(config, name, rank),
            bool(embedding) or bool(config.get("fan_in_fan_out")),
        )
    return Adapter(folder, config, adapter.deltas, adapter.replaced, tuple(foreign))


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def product(a: torch.Tensor, b: torch.Tensor, delta: Delta) -> torch.Tensor:
    """The change itself, float32, in the layout of the base tensor.

    Args:
        a: (rank, in).
        b: (out, rank).
        delta: which change; gives the scale and the layout.

    Returns:
        ``scale * b @ a``: (out, in), or (in, out) when the base is transposed.
    """
    change = delta.scale * (b.float() @ a.float())
    return change.T if delta.transposed else change
