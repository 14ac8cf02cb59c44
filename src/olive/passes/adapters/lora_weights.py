"""What a LoRA adapter on disk adds to which tensor of its base.

The formula is that of Hu et al. 2021 (arXiv:2106.09685) with the rank-stabilised scale of Kalajdzievski 2023
(arXiv:2312.03732); the layout on disk is that of PEFT's ``adapter_model.safetensors``.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed
from olive.models.tensors import Tensors, read_header

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_AGAIN = "Train the adapter again, or copy it again."
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
    "alora_invocation_tokens": "an activated LoRA (only in force after its invocation tokens)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "Monte Carlo LoRA",
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
        tensors: tensor name -> (safetensors dtype code, shape), from the header.
    """

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    tensors: Tensors = field(default_factory=dict)

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
        raise PassFailed(f"the adapter has no readable {CONFIG}: {error}", fix=_AGAIN) from error
    if not isinstance(config, dict):
        raise PassFailed(f"{path} is not a JSON object", fix=_AGAIN)
    return config


def read(folder: Path) -> Adapter:
    """Read what the adapter in ``folder`` changes, from its config and header: no tensor, no torch.

    Raises:
        PassFailed: no adapter there, a kind of adapter that needs more than ``W + s B A``, or half a pair.
        UntrustedInput: the file is truncated or malformed.
    """
    config = read_config(folder)
    if found := unsupported(config):
        raise PassFailed(
            f"the adapter is {found}; MergeAdapterWeights merges LoRA and rsLoRA",
            fix="Merge it with the library that trained it, and use the result as input_model.",
        )
    try:
        tensors = read_header(folder / WEIGHTS)
    except OSError as error:
        raise PassFailed(f"the adapter has no readable {WEIGHTS}: {error}", fix=_AGAIN) from error
    adapter = Adapter(folder, config, tensors=tensors)
    foreign: list[str] = []
    halves: dict[tuple[str, bool], dict[str, str]] = {}
    for name in tensors:
        base = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(base)
        if base == name:
            foreign.append(name)
        elif match is None:
            adapter.replaced[base.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
        else:
            halves.setdefault((match["module"], bool(match["embedding"])), {})[match["part"]] = name
    for (module, embedding), pair in halves.items():
        delta = _delta(adapter, module, embedding, pair)
        adapter.deltas[delta.target] = delta
    return replace(adapter, foreign=tuple(foreign))


def _delta(adapter: Adapter, module: str, embedding: bool, pair: dict[str, str]) -> Delta:
    if set(pair) != {"A", "B"}:
        raise PassFailed(f"the adapter has only {', '.join(pair.values())} of {module}", fix=_AGAIN)
    for name in pair.values():
        shape = adapter.tensors[name][1]
        if len(shape) != 2 or 0 in shape:
            raise PassFailed(
                f"{name} has shape {shape}; the factor of a linear layer has two axes",
                fix="Train on linear layers: set target_modules.",
            )
    rank = adapter.tensors[pair["A"]][1][0]
    transposed = embedding or bool(adapter.config.get("fan_in_fan_out"))
    scale = _scale(adapter.config, module, rank)
    return Delta(f"{module}.weight", pair["A"], pair["B"], scale, transposed)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def add_product(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, delta: Delta) -> None:
    """``weight += scale * B A``, in place: nothing else of the weight's size is allocated.

    Args:
        weight: float32, in the layout of the base tensor.
        a: (rank, in).
        b: (out, rank).
        delta: which change; gives the scale and the layout.
    """
    left, right = (a.float().T, b.float().T) if delta.transposed else (b.float(), a.float())
    weight.addmm_(left, right, alpha=delta.scale)
