"""GPTQ: round column by column, and let the columns to come make up for each error.

Frantar et al. 2022 (arXiv:2210.17323), with what practice added: grids fixed before the sweep, so that
columns may be taken in order of their inputs' energy without an index of groups at run time; scales and zero
points searched with that energy as the weight of each error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from olive.quantization.grid import Quantised
from olive.quantization.threads import one_thread_an_operation

_TOGETHER = 16  # columns corrected one by one; larger spans in one product for all columns before them


def gptq(
    weight: torch.Tensor,
    factor: torch.Tensor,
    order: torch.Tensor,
    start: Quantised,
) -> Quantised:
    """Choose codes on the grid of ``start`` so that the layer's output changes least.

    Args:
        weight: (rows, columns) float32.
        factor: unit upper triangular, of ``hessian.feedback``, rows and columns in ``order``.
        order: int64 (columns,), in which columns are rounded.
        start: scales and zero points of every block; its codes are not looked at.

    Returns:
        New codes, with the scales and zero points of ``start``.
    """
    grid = start.grid
    rows, columns = weight.shape
    # a column of the matrix is a row here, so that it lies in one piece
    left = weight.T[order].contiguous()
    errors = left.clone()  # of a column to come: the weights themselves
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    block_of = torch.div(order, grid.width(columns), rounding_mode="floor")
    scales = start.scales.T.contiguous()
    middle = torch.full_like(scales, float(grid.middle))
    zeros = middle if start.zeros is None else start.zeros.T.float().contiguous()
    levels = (1 if grid.kind == "symmetric" else 0), grid.top
    together, round_columns = _TOGETHER, _round_columns
    if weight.is_cuda:
        from olive.quantization import gpu_kernels

        together, round_columns = gpu_kernels.TOGETHER, gpu_kernels.round_columns

    def carry(first: int, half: int, last: int) -> None:
        left[half:last].addmm_(factor[first:half, half:last].T, errors[first:half])

    def one_by_one(first: int, last: int) -> None:
        round_columns(left, errors, codes, factor, block_of, scales, zeros, (first, last), levels)

    with one_thread_an_operation():
        _halve(0, columns, together, one_by_one, carry)
    back = torch.empty_like(order)
    back[order] = torch.arange(columns, device=order.device)
    return Quantised(grid, codes[back].T.contiguous(), start.scales, start.zeros)


def _halve(
    first: int,
    last: int,
    together: int,
    one: Callable[[int, int], None],
    carry: Callable[[int, int, int], None],
) -> None:
    """Go from ``first`` to ``last`` in spans of at most ``together``: all before the half, what they mean for
    those after it, then these. No closure, which by naming itself would hold its matrices until a collection.
    """
    if last - first <= together:
        one(first, last)
        return
    spans = -(-(last - first) // together)
    half = first + spans // 2 * together
    _halve(first, half, together, one, carry)
    carry(first, half, last)
    _halve(half, last, together, one, carry)


def _round_columns(
    left: torch.Tensor,
    errors: torch.Tensor,
    codes: torch.Tensor,
    factor: torch.Tensor,
    block_of: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    span: tuple[int, int],
    levels: tuple[int, int],
) -> None:
    """As ``gpu_kernels.round_columns``."""
    first, last = span
    blocks = block_of[first:last]
    steps, points = scales[blocks], zeros[blocks]
    inverse = torch.where(steps == 0, 0.0, 1.0 / steps)
    part = left[first:last]
    for i in range(last - first):
        code = torch.addcmul(points[i], part[i], inverse[i]).round_().clamp_(*levels)
        codes[first + i] = code
        error = errors[first + i].sub_(code.sub_(points[i]).mul_(steps[i]))
        if first + i + 1 < last:
            part[i + 1 :].addr_(factor[first + i, first + i + 1 : last], error)


def refit(weight: torch.Tensor, start: Quantised, sums: torch.Tensor, damping: float = 0.0) -> Quantised:
    """Fit the scales to the codes, block after block, so that the layer's output changes least.

    With codes and the other scales fixed the error is a parabola in the scale of a block, for each row apart:
    coordinate descent, of which every step is exact. One sweep over all blocks.

    Args:
        weight: (rows, columns) float32.
        start: codes, scales and zero points.
        sums: (columns, columns) second moments of the inputs.
        damping: share of the mean of the diagonal of ``sums`` that is added to it.

    Returns:
        New scales, of the signs they had, with the codes and zero points of ``start``.
    """
    grid = start.grid
    rows, columns = weight.shape
    width = grid.width(columns)
    scales = start.scales.clone()
    zeros = float(grid.middle) if start.zeros is None else start.zeros.float()[..., None]
    codes = (start.codes.view(rows, -1, width).float() - zeros).view(rows, columns)
    more = damping * float(sums.diagonal().mean())
    # what the error of a row costs, by column: (w - q) H
    error = weight - (codes.view(rows, -1, width) * scales[..., None]).view(rows, columns)
    slope = torch.addmm(error, error, sums, beta=more)
    del error
    fast = None
    if weight.is_cuda:
        from olive.quantization import gpu_kernels

        fast = gpu_kernels.refit_block if gpu_kernels.fits_refit(width) else None

    def one(block: int, _: int) -> None:
        if fast is not None:
            fast(slope, codes, sums, scales, block, more)
            return
        part = slice(block * width, (block + 1) * width)
        own = codes[:, part]
        curve = torch.addmm(own, own, sums[part, part], beta=more).mul_(own).sum(1)
        step = torch.where(curve > 0, (slope[:, part] * own).sum(1) / curve.clamp(min=1e-30), 0.0)
        step = torch.where((scales[:, block] + step) * scales[:, block] > 0, step, 0.0)
        scales[:, block] += step
        own.mul_(step[:, None])  # from here on: by how much these weights moved

    def carry(first: int, half: int, last: int) -> None:
        before, after = slice(first * width, half * width), slice(half * width, last * width)
        slope[:, after].addmm_(codes[:, before], sums[before, after], alpha=-1.0)

    with one_thread_an_operation():
        _halve(0, columns // width, 1, one, carry)
    return Quantised(grid, start.codes, scales, start.zeros)
