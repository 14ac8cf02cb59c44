"""HQQ: the grid of least lp error, p below 1, which large weights pull less than a squared error lets them.

The objective is that of Badri and Shaji 2023 (half-quadratic quantisation), ``sum |w - q|^p``. They solve for
a real zero point with the scale fixed. Here both are free and the zero point is a code: the lp norm is
replaced by a weighted squared one that touches it at the errors so far (iteratively reweighted least
squares), and each round is the search of ``k_quant``.
"""

from __future__ import annotations

import torch

from olive.quantization.grid import Grid, Quantised
from olive.quantization.k_quant import search

_SOFT = 0.05  # of the block's mean error: below it errors count alike, or weights that fit would pin the grid


def lp_error(weight: torch.Tensor, one: Quantised, p: float) -> torch.Tensor:
    """``sum |w - q|^p`` of each block, float32 (rows, blocks)."""
    error = (weight.float() - one.dequantise()).abs().pow(p)
    return error.view(*one.scales.shape, -1).sum(-1)


def hqq(weight: torch.Tensor, grid: Grid, p: float = 0.7, rounds: int = 4) -> Quantised:
    """Quantise without data.

    Args:
        weight: (rows, columns) of any floating dtype.
        grid: with integer zero points, or symmetric.
        p: of the norm, in (0, 2].
        rounds: of reweighting; each block keeps the best it had.
    """
    best = search(weight, grid)
    lowest = lp_error(weight, best, p)
    current = best
    for _ in range(rounds):
        blocks = (weight.float() - current.dequantise()).abs().view(*current.scales.shape, -1)
        floor = _SOFT * blocks.mean(-1, keepdim=True) + 1e-12
        importance = torch.maximum(blocks, floor).pow(p - 2)
        importance /= importance.mean(-1, keepdim=True)
        current = search(weight, grid, importance.view(weight.shape))
        error = lp_error(weight, current, p)
        best, lowest = _better(best, current, error < lowest), torch.minimum(error, lowest)
    return best


def _better(one: Quantised, other: Quantised, where: torch.Tensor) -> Quantised:
    """``other`` in the blocks that ``where`` (rows, blocks) names, else ``one``."""
    shape = (*one.scales.shape, -1)
    codes = torch.where(where[..., None], other.codes.view(shape), one.codes.view(shape))
    zeros = None
    if one.zeros is not None and other.zeros is not None:
        zeros = torch.where(where, other.zeros, one.zeros)
    scales = torch.where(where, other.scales, one.scales)
    return Quantised(one.grid, codes.view(one.codes.shape), scales, zeros)
