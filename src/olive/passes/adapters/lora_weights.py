"""What an adapter on disk changes in which tensor of its base.

LoRA (Hu et al. 2021, arXiv:2106.09685) with the rank-stabilised scale of Kalajdzievski 2023
(arXiv:2312.03732), DoRA (Liu et al. 2024, arXiv:2402.09353), LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098)
and LoKr (Yeh et al. 2023, arXiv:2309.14859); the layout on disk is that of PEFT's
``adapter_model.safetensors``.
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

    from olive.models.stream import LazyTensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_AGAIN = "Train the adapter again, or copy it again."
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>A|B|magnitude_vector)(?:\.weight)?"
)
_PRODUCT = re.compile(r"(?P<module>.+)\.(?P<kind>hada|lokr)_(?P<part>w[12](?:_[ab])?)")
_UNSUPPORTED = {
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
# These start from a changed base: without word of it, the base on disk plus B A is not what was trained.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Delta:
    """One change of low rank.

    Attributes:
        target: name of the base tensor that changes.
        a, b: names of the two factors in the adapter's file.
        scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` when rank-stabilised.
        transposed: the base stores the weight as (in, out).
        magnitude: name of the tensor with the length of each row (DoRA), else None.
    """

    target: str
    a: str
    b: str
    scale: float
    transposed: bool
    magnitude: str | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """One change that is a product of two matrices, each given whole or by two factors.

    Attributes:
        target: name of the base tensor that changes.
        kind: ``hada``, elementwise, or ``lokr``, the Kronecker product.
        parts: ``w1``, ``w1_a``, ``w1_b``, ``w2``, ... -> name in the adapter's file.
        scale: ``alpha / rank``.
    """

    target: str
    kind: str
    parts: dict[str, str]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter, read but not loaded.

    Attributes:
        folder: where it lies.
        config: its adapter_config.json.
        deltas, products: base tensor name -> change.
        replaced: base tensor name -> name of the tensor in the adapter that takes its place.
        foreign: tensors of the adapter that fit no scheme known here.
        tensors: tensor name -> (safetensors dtype code, shape), from the header.
    """

    folder: Path
    config: dict[str, Any]
    deltas: dict[str, Delta] = field(default_factory=dict)
    products: dict[str, Product] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    tensors: Tensors = field(default_factory=dict)

    @property
    def targets(self) -> set[str]:
        """Every base tensor that the adapter changes."""
        return {*self.deltas, *self.products, *self.replaced}


def unsupported(config: dict[str, Any], told: bool = False) -> str | None:
    """What in an adapter's config cannot be merged here, in words; None when nothing.

    Args:
        config: its adapter_config.json.
        told: whether the adapter says what was done to its base.
    """
    kind = str(config.get("peft_type", "LORA"))
    if kind not in ("LORA", "LOHA", "LOKR"):
        return f"a {kind} adapter"
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGES_BASE) and not told:
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
        PassFailed: no adapter there, a kind of adapter that is not known here, or half a pair.
        UntrustedInput: the file is truncated or malformed.
    """
    config = read_config(folder)
    if found := unsupported(config, (folder / "base" / "seen.json").is_file()):
        raise PassFailed(
            f"the adapter is {found}; MergeAdapterWeights merges LoRA, rsLoRA, DoRA, LoHa and LoKr",
            fix="Merge it with the library that trained it, and use the result as input_model.",
        )
    try:
        tensors = read_header(folder / WEIGHTS)
    except OSError as error:
        raise PassFailed(f"the adapter has no readable {WEIGHTS}: {error}", fix=_AGAIN) from error
    adapter = Adapter(folder, config, tensors=tensors)
    foreign: list[str] = []
    halves: dict[tuple[str, bool], dict[str, str]] = {}
    parts: dict[tuple[str, str], dict[str, str]] = {}
    for name in tensors:
        base = name.removeprefix(_PREFIX)
        match, product = _LORA.fullmatch(base), _PRODUCT.fullmatch(base)
        if base == name:
            foreign.append(name)
        elif match is not None:
            halves.setdefault((match["module"], bool(match["embedding"])), {})[match["part"]] = name
        elif product is not None:
            parts.setdefault((product["module"], product["kind"]), {})[product["part"]] = name
        else:
            adapter.replaced[base.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
    for (module, embedding), pair in halves.items():
        delta = _delta(adapter, module, embedding, pair)
        adapter.deltas[delta.target] = delta
    for (module, kind), found_parts in parts.items():
        adapter.products[f"{module}.weight"] = _product(adapter, module, kind, found_parts)
    return replace(adapter, foreign=tuple(foreign))


def _delta(adapter: Adapter, module: str, embedding: bool, pair: dict[str, str]) -> Delta:
    magnitude = pair.pop("magnitude_vector", None)
    if set(pair) != {"A", "B"} or (bool(adapter.config.get("use_dora")) != (magnitude is not None)):
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
    return Delta(f"{module}.weight", pair["A"], pair["B"], scale, transposed, magnitude)


def _product(adapter: Adapter, module: str, kind: str, parts: dict[str, str]) -> Product:
    for half in ("w1", "w2"):
        if half not in parts and not {f"{half}_a", f"{half}_b"} <= parts.keys():
            raise PassFailed(f"the adapter has no whole {half} of {module}", fix=_AGAIN)
    if any(len(adapter.tensors[name][1]) != 2 for name in parts.values()):
        raise PassFailed(
            f"the adapter of {module} is not that of a linear layer",
            fix="Train on linear layers: set target_modules.",
        )
    alpha, rank = _pattern(adapter.config, "alpha", module), _pattern(adapter.config, "r", module)
    return Product(f"{module}.weight", kind, parts, float(alpha) / float(rank))


def _pattern(config: dict[str, Any], name: str, module: str) -> Any:
    for pattern, value in (config.get({"r": "rank_pattern"}.get(name, f"{name}_pattern")) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return config.get(name, 8)


def shape_of(adapter: Adapter, target: str) -> tuple[int, ...]:
    """The shape that the change of ``target`` has, from the header.

    Raises:
        PassFailed: the factors do not fit each other.
    """
    if (delta := adapter.deltas.get(target)) is not None:
        (rank, inputs), (outputs, other) = adapter.tensors[delta.a][1], adapter.tensors[delta.b][1]
        if rank != other:
            raise PassFailed(
                f"{delta.a} has rank {rank} and {delta.b} has rank {other}",
                fix="The adapter is damaged: train it again, or copy it again.",
            )
        return (inputs, outputs) if delta.transposed else (outputs, inputs)
    product = adapter.products[target]
    sizes = []
    for half in ("w1", "w2"):
        names = [product.parts[half]] * 2 if half in product.parts else []
        first, last = names or [product.parts[f"{half}_a"], product.parts[f"{half}_b"]]
        rows, inner = adapter.tensors[first][1]
        other, columns = adapter.tensors[last][1]
        if not names and inner != other:
            raise PassFailed(
                f"{first} has rank {inner} and {last} has rank {other}",
                fix="The adapter is damaged: train it again, or copy it again.",
            )
        sizes.append((rows, columns))
    (a, b), (c, d) = sizes
    return (a * c, b * d) if product.kind == "lokr" else (a, b)


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


def change_length(weight: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Give each row of float32 ``weight`` (out, in), base and change in it, the length trained for it."""
    import torch

    lengths = torch.linalg.vector_norm(weight, dim=1)
    weight.mul_((magnitude.float().view(-1) / lengths)[:, None])


def product_change(product: Product, factors: LazyTensors) -> torch.Tensor:
    """``scale`` times the product, float32 in the layout of the base tensor."""
    import torch

    halves = []
    for half in ("w1", "w2"):
        if half in product.parts:
            halves.append(factors[product.parts[half]].float())
        else:
            a, b = (factors[product.parts[f"{half}_{side}"]].float() for side in "ab")
            halves.append(a @ b)
    first, second = halves
    whole = first * second if product.kind == "hada" else torch.kron(first, second)
    return whole.mul_(product.scale)
