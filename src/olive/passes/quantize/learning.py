"""Learn the roundings of one decoder layer by its output. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from olive.passes.quantize.layers import LayerStream
from olive.quantization.rounding import LearnedRounding

Given = tuple[tuple[Any, ...], dict[str, Any]]


def learn(
    stream: LayerStream,
    number: int,
    layer: nn.Module,
    original: nn.Module,
    roundings: Mapping[str, LearnedRounding],
    *,
    steps: int,
    rates: tuple[float, float],
    batch: int,
    seed: int,
    quantised_input: bool,
) -> tuple[float, float]:
    """Change ``roundings`` so that the layer's output comes near the unchanged model's.

    Of the start, the step of least loss on its own rows, and the last step, what is best on all rows is kept.

    Args:
        stream: with the unchanged model beside.
        number: of the decoder layer.
        layer: its weights are not changed.
        original: the unchanged layer.
        roundings: by the name of the weight in the layer.
        steps: how many; the size of a step falls to 0 over them.
        rates: size of the first step of offsets and of factors.
        batch: rows of a step.
        seed: of the draw of rows.
        quantised_input: whether the layer reads what quantised layers before it give.

    Returns:
        Mean squared error of the output on all rows, at the start and of what was kept.
    """
    inputs = stream.now if quantised_input else stream.before
    given = [each[number] for each in stream.given]
    with torch.no_grad():
        aims = [_call(original, {}, hidden, each) for hidden, each in zip(stream.before, given, strict=True)]
    rows = [(place, row) for place, hidden in enumerate(inputs) for row in range(len(hidden))]
    draw = torch.Generator().manual_seed(1_000_003 * seed + number)
    learned = [tensor for rounding in roundings.values() for tensor in rounding.learned]

    def loss(place: int, picked: list[int], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the squared errors of some rows of a batch."""
        index = torch.tensor(picked, device=stream.device)
        made = _call(layer, weights, inputs[place][index], _rows(given[place], index, len(inputs[place])))
        error = (made - aims[place][index]) * stream.masks[place][index][..., None]
        return error.square().sum()

    real = [mask.sum(1).tolist() for mask in stream.masks]
    width = inputs[0].shape[-1]
    total = width * sum(map(sum, real))

    @torch.no_grad()
    def on_all() -> float:
        weights = {name: rounding.forward() for name, rounding in roundings.items()}
        parts = [
            loss(place, list(range(first, min(first + batch, len(hidden)))), weights)
            for place, hidden in enumerate(inputs)
            for first in range(0, len(hidden), batch)
        ]
        return float(torch.stack(parts).sum()) / total

    start = [tensor.detach().clone() for tensor in learned]
    first = on_all()
    best = [tensor.clone() for tensor in start]
    least = torch.full((), torch.inf, device=stream.device)
    for step in range(steps):
        picked: dict[int, list[int]] = {}
        for at in torch.randperm(len(rows), generator=draw)[:batch].tolist():
            picked.setdefault(rows[at][0], []).append(rows[at][1])
        weights = {name: rounding.forward() for name, rounding in roundings.items()}
        count = width * sum(real[place][row] for place, some in picked.items() for row in some)
        value = torch.stack([loss(place, some, weights) for place, some in picked.items()]).sum() / count
        value.backward()
        with torch.no_grad():
            better = value < least
            least = torch.where(better, value, least)
            for kept, tensor in zip(best, learned, strict=True):
                kept.copy_(torch.where(better, tensor, kept))
        for rounding in roundings.values():
            rounding.step(*(rate * (1 - step / steps) for rate in rates))
    last = [tensor.detach().clone() for tensor in learned]
    found = [(first, start), (on_all(), last)]
    _put(learned, best)
    found.append((on_all(), best))
    after, kept_best = min((pair for pair in found if pair[0] == pair[0]), key=lambda pair: pair[0])
    _put(learned, kept_best)
    return first, after


@torch.no_grad()
def _put(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _call(
    layer: nn.Module, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, given: Given
) -> torch.Tensor:
    made = functional_call(layer, dict(weights), (hidden, *given[0]), given[1])
    return made[0] if isinstance(made, tuple) else made


def _rows(given: Given, index: torch.Tensor, count: int) -> Given:
    """What a layer is called with, for some rows of a batch of ``count``."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each) for each in value)
        of_rows = isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == count > 1
        return value[index] if of_rows else value

    return cut(given[0]), {name: cut(value) for name, value in given[1].items()}
