"""AWQ: make the inputs that matter larger before rounding, and divide by as much before the layer.

Lin et al. 2023 (arXiv:2306.00978). ``Q(W s) (x / s)`` equals ``W x`` but for rounding, and rounding spares
the columns that s enlarges. The search is over s = energy^(ratio / 2); the error is that of the outputs, told
from second moments, so that no activations are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from olive.quantization.errors import output_error
from olive.quantization.grid import Grid, Quantised
from olive.quantization.k_quant import SPANS, search

_SPANS = (0.0, 0.7)  # scales tried while the ratio is sought


def scale_of(energy: torch.Tensor, ratio: float) -> torch.Tensor:
    """(columns,) float32 factors; 1 in the geometric middle of the largest and the smallest."""
    scale = energy.clamp(min=1e-12 * float(energy.max())).pow(ratio / 2)
    return scale / (scale.max() * scale.min()).sqrt()


def quantise_scaled(
    weight: torch.Tensor, scale: torch.Tensor, energy: torch.Tensor, grid: Grid, spans: Sequence[float] | None
) -> Quantised:
    """``weight`` with its columns enlarged by ``scale``, errors weighted by what is left of the inputs."""
    importance = energy / scale.square()
    return search(weight * scale, grid, importance / importance.mean(), spans or SPANS)


def best_scale(
    weights: Sequence[torch.Tensor],
    grids: Sequence[Grid],
    sums: torch.Tensor,
    energy: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, float]:
    """The factors of least output error for layers that share an input.

    Args:
        weights: (rows, columns) float32 of each layer.
        grids: of each layer.
        sums: (columns, columns) second moments of the input.
        energy: (columns,) mean square of each input.
        steps: ratios tried, from 0 (no change) in steps of 1 / steps below 1.

    Returns:
        Factors (columns,), and the ratio they belong to.
    """
    best: tuple[float, torch.Tensor, float] | None = None
    for step in range(steps):
        ratio = step / steps
        scale = scale_of(energy, ratio)
        error = 0.0
        for weight, grid in zip(weights, grids, strict=True):
            made = quantise_scaled(weight, scale, energy, grid, _SPANS).dequantise() / scale
            error += output_error(weight, made, sums)
        if best is None or error < best[0]:
            best = error, scale, ratio
    assert best is not None  # noqa: S101 - steps is at least 1
    return best[1], best[2]
