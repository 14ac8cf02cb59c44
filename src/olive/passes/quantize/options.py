"""What each layer may be given, what that takes, and the choice of least loss within a budget. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from olive.models.artifact import ModelInfo
from olive.models.quantised import EMBEDDING, HEAD, Layer
from olive.passes.quantize import kernels, targets

if TYPE_CHECKING:
    from olive.passes.quantize.mixed_precision import SelectiveMixedPrecision

BLOCKS = (16, 32, 64, 128)
_STEPS = 2048  # of the budget: sizes are rounded to them


def high_params(params: SelectiveMixedPrecision.Params) -> SelectiveMixedPrecision.Params:
    """The pass's parameters with the settings of a layer that needs more."""
    sym = params.sym if params.high_sym is None else params.high_sym
    group = params.high_group_size or params.group_size
    return params.model_copy(update={"bits": params.high_bits, "group_size": group, "sym": sym})


def options_of(
    info: ModelInfo, params: SelectiveMixedPrecision.Params, provider: str
) -> dict[str, tuple[Layer, ...]]:
    """Settings of each layer to choose from: ``bits`` first, ``high_bits`` second, then other blocks.

    Without ``group_sizes``, ``kl`` also takes the blocks that a verified kernel has and the row divides into.
    """
    plain = info.model_copy(update={"path": info.path / "-"})  # an earlier choice does not bind a new one
    high = targets.chosen(plain, high_params(params))
    found = {}
    for name, low in targets.chosen(plain, params).items():
        many = [low, high[name]]
        width = shape_of(info, name)[1]
        for layer in () if params.algorithm.startswith("k_quant") else (low, high[name]):
            verified = kernels.blocks_of(provider, layer.bits) or ()
            groups = BLOCKS if params.group_sizes is None else params.group_sizes
            many += [
                Layer(layer.bits, group, layer.symmetric)
                for group in groups
                if width % group == 0 and (params.group_sizes is not None or group in verified)
            ]
        found[name] = tuple(dict.fromkeys(many)) if low != high[name] else tuple(many[:2])
    return found


def units_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that must share their settings together, since the export packs them into one matrix."""
    units: dict[str, list[str]] = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        shared = next((key[0] for key in targets.SHARED if last in key), None)
        units.setdefault(name if shared is None else f"{prefix}.{shared}", []).append(name)
    return [tuple(unit) for unit in units.values()]


def shape_of(info: ModelInfo, name: str) -> tuple[int, ...]:
    """(rows, columns) of a layer; of a head that has no matrix of its own, the embedding's."""
    key = f"{name}.weight"
    if name == HEAD and key not in info.tensors:
        key = f"{EMBEDDING}.weight"
    return info.tensors[key][1]


def weights_of(info: ModelInfo, name: str) -> int:
    """Weights of a layer."""
    return prod(shape_of(info, name))


def bytes_of(info: ModelInfo, name: str, layer: Layer) -> int:
    """Stored bytes of a layer: integers, scales of float32, packed zero points."""
    rows, columns = shape_of(info, name)
    blocks = layer.block_count(columns)
    zeros = 0 if layer.symmetric else -(-blocks * layer.bits // 8)
    return rows * (columns * layer.bits // 8 + 4 * blocks + zeros)


def budget_of(
    info: ModelInfo,
    params: SelectiveMixedPrecision.Params,
    options: Mapping[str, Sequence[Layer]],
) -> int:
    """Bytes that the quantised matrices may take together."""
    weights = sum(weights_of(info, name) for name in options)
    if params.size is not None:
        return int(params.size * 2 * weights if params.size <= 1 else params.size)
    if params.bits_per_weight is not None:
        return int(params.bits_per_weight * weights / 8)
    low, high = (sum(bytes_of(info, name, many[place]) for name, many in options.items()) for place in (0, 1))
    ratio = params.ratio if params.ratio is not None else 1.0
    return int(ratio * low + (1 - ratio) * high)


def choose_within(items: Sequence[Sequence[tuple[int, float]]], budget: int) -> tuple[int, ...] | None:
    """The options of least total loss within a budget, as ``quantization.knapsack.choose``.

    Many settings make sums of bytes that coincide too seldom for exact states; so sizes above each item's
    smallest are rounded to 1/2048 of what the budget leaves. The budget is held in true bytes.

    Args:
        items: of each, its options as (bytes, loss).
        budget: bytes of all items together.

    Returns:
        Number of the option taken for each item; None where even the smallest do not fit.
    """
    from olive.quantization.knapsack import choose

    least = [min(size for size, _ in item) for item in items]
    spare = budget - sum(least)
    if spare < 0:
        return None
    step = max(1, spare // _STEPS)
    rounded = [
        [(round((size - smallest) / step), loss) for size, loss in item]
        for item, smallest in zip(items, least, strict=True)
    ]
    allowed = spare // step
    while (taken := choose(rounded, allowed)) is not None:
        used = sum(item[number][0] for item, number in zip(items, taken, strict=True))
        if used <= budget:
            return taken
        allowed -= max(1, -(-(used - budget) // step))
    return tuple(
        next(number for number, (size, _) in enumerate(item) if size == smallest)
        for item, smallest in zip(items, least, strict=True)
    )
