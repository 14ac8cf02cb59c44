"""GPTQ's sweep and the search of scales on a GPU, in Triton, which comes with torch's CUDA builds.

Imported only there. The formulas are those of ``gptq`` and ``k_quant``; sums may differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from triton import language as tl

from olive.quantization.grid import Grid
from olive.quantization.launch import Kernel

TOGETHER = 64  # columns that ``round_columns`` takes at most
_ROWS = 32
_TILE = 2048  # weights of a program of the search


@triton.jit
def _even(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, halves to even; of magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator]
def _columns(  # type: ignore[no-untyped-def]
    left, errors, codes, factor, block_of, scales, zeros, rows, count, factor_row, factor_column,
    lowest, top,
    SPAN: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, SPAN)
    inside = row < rows
    at = place[:, None] * rows + row[None, :]
    both = (place < count)[:, None] & inside[None, :]
    now = tl.load(left + at, mask=both, other=0.0)
    lost = tl.load(errors + at, mask=both, other=0.0)  # the weights; of a rounded column, its error
    code = tl.zeros((SPAN, ROWS), dtype=tl.float32)
    for i in range(count):
        here = (place == i)[:, None]
        block = tl.load(block_of + i)
        scale = tl.load(scales + block * rows + row, mask=inside, other=0.0)
        zero = tl.load(zeros + block * rows + row, mask=inside, other=0.0)
        value = tl.sum(tl.where(here, now, 0.0), 0)
        inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)
        level = tl.minimum(tl.maximum(value * inverse + zero, lowest - 1.0), top + 1.0)
        level = tl.minimum(tl.maximum(_even(level), lowest), top)
        error = tl.sum(tl.where(here, lost, 0.0), 0) - (level - zero) * scale
        code = tl.where(here, level[None, :], code)
        lost = tl.where(here, error[None, :], lost)
        share = tl.load(
            factor + i * factor_row + place * factor_column,
            mask=(place > i) & (place < count), other=0.0,
        )  # fmt: skip
        now += share[:, None] * error[None, :]
    tl.store(errors + at, lost, mask=both)
    tl.store(codes + at, code.to(tl.uint8), mask=both)


def round_columns(
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
    """Round columns ``span`` one by one, each making up for the ones before it in the span.

    Args:
        left: float32 (columns, rows): what to round, all earlier spans made up for.
        errors: float32 (columns, rows): the weights; of the span's columns their errors afterwards.
        codes: uint8 (columns, rows), written.
        factor: unit upper triangular (columns, columns).
        block_of: int64 (columns,).
        scales: float32 (blocks, rows).
        zeros: float32 (blocks, rows).
        span: first column, and the one after the last: at most ``TOGETHER``.
        levels: lowest and highest code.
    """
    rows = left.shape[1]
    first, last = span
    # what lies before the span is left out of the pointers: a call's numbers are then few
    _COLUMNS(
        (triton.cdiv(rows, _ROWS), 1),
        left[first:], errors[first:], codes[first:], factor[first:, first:], block_of[first:], scales, zeros,
        rows, last - first, *factor.stride(), float(levels[0]), float(levels[1]), TOGETHER, _ROWS,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _scale(  # type: ignore[no-untyped-def]
    slope, codes, sums, scales, more, rows, row_size, sums_row, blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, WIDTH)
    inside = row < rows
    at = row.to(tl.int64)[:, None] * row_size + place[None, :]
    own = tl.load(codes + at, mask=inside[:, None], other=0.0)
    grad = tl.load(slope + at, mask=inside[:, None], other=0.0)
    square = tl.load(sums + place.to(tl.int64)[:, None] * sums_row + place[None, :])
    along = tl.dot(own, square, input_precision="ieee") + more * own
    curve = tl.sum(along * own, 1)
    step = tl.where(curve > 0.0, tl.sum(grad * own, 1) / tl.maximum(curve, 1e-30), 0.0)
    scale = tl.load(scales + row.to(tl.int64) * blocks, mask=inside, other=0.0)
    step = tl.where((scale + step) * scale > 0.0, step, 0.0)
    tl.store(scales + row.to(tl.int64) * blocks, scale + step, mask=inside)
    tl.store(codes + at, own * step[:, None], mask=inside[:, None])


def fits_refit(width: int) -> bool:
    """Whether ``refit_block`` knows blocks of so many weights."""
    return width in (16, 32, 64)


def refit_block(
    slope: torch.Tensor,
    codes: torch.Tensor,
    sums: torch.Tensor,
    scales: torch.Tensor,
    block: int,
    more: float,
) -> None:
    """Fit the scale of one block of each row: a step of ``gptq.refit``.

    Args:
        slope: float32 (rows, columns), of the error by the weights.
        codes: float32 (rows, columns), less their zero points; of this block afterwards by how much its
            weights moved.
        sums: float32 (columns, columns).
        scales: float32 (rows, blocks), of this block changed.
        block: which.
        more: added to the diagonal of ``sums``.
    """
    rows, blocks = scales.shape
    width = codes.shape[1] // blocks
    first = block * width
    _SCALE(
        (triton.cdiv(rows, _ROWS), 1),
        slope[:, first:], codes[:, first:], sums[first:, first:], scales[:, block:], more,
        rows, codes.stride(0), sums.stride(0), blocks, width, _ROWS,
    )  # fmt: skip


_COLUMNS, _SCALE = Kernel(_columns, num_warps=2), Kernel(_scale, num_warps=2)


@triton.jit
def _gain(n, w, share, scale_zero, lowest, top):  # type: ignore[no-untyped-def]
    cut = tl.minimum(tl.maximum(n, lowest - scale_zero[:, None]), top - scale_zero[:, None])
    return tl.sum(w * share * cut, 1), tl.sum(cut * cut * share, 1)


@triton.jit
def _try(w, share, scale, zero, lowest, top, gains, scales, zeros):  # type: ignore[no-untyped-def]
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / scale)
    n = _even(tl.minimum(tl.maximum(w * inverse[:, None], -4e6), 4e6))
    along, own = _gain(n, w, share, zero, lowest, top)
    fitted = along / own
    gain = along * fitted
    better = gain > gains  # false for NaN, as of a block of zeros
    return tl.where(better, gain, gains), tl.where(better, fitted, scales), tl.where(better, zero, zeros)


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    weight, importance, first_scales, first_zeros, spans, out_scales, out_zeros, total, blocks, lowest, top,
    KIND: tl.constexpr, WEIGHTED: tl.constexpr, SPANS: tl.constexpr, REFINE: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr, COUNT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    block = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    place = tl.arange(0, WIDTH)
    inside = block < total
    at = block.to(tl.int64)[:, None] * WIDTH + place[None, :]
    w = tl.load(weight + at, mask=inside[:, None], other=0.0)
    share = w * 0.0 + 1.0
    if WEIGHTED == 1:
        share = tl.load(importance + (block % blocks)[:, None] * WIDTH + place[None, :])
    if WEIGHTED == 2:
        share = tl.load(importance + at, mask=inside[:, None], other=0.0)
    scales = tl.load(first_scales + block, mask=inside, other=0.0)
    zeros = tl.load(first_zeros + block, mask=inside, other=0.0)
    inverse = tl.where(scales == 0.0, 0.0, 1.0 / scales)
    n = _even(tl.minimum(tl.maximum(w * inverse[:, None], -4e6), 4e6))
    along, own = _gain(n, w, share, zeros, lowest, top)
    gains = 2.0 * scales * along - scales * scales * own  # as is: not the best scale for its codes
    low, high = tl.min(w, 1), tl.max(w, 1)
    if KIND == 0:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    for i in range(SPANS):
        span = tl.load(spans + i)
        if KIND == 0:
            scale = (high - low) / (top + span)
            below = tl.floor(tl.where(scale == 0.0, 0.0, -low / scale) - 0.5 * span)
            zero = tl.minimum(tl.maximum(below, 0.0), top)
            gains, scales, zeros = _try(w, share, scale, zero, lowest, top, gains, scales, zeros)
            zero = tl.minimum(tl.maximum(below + 1.0, 0.0), top)
            gains, scales, zeros = _try(w, share, scale, zero, lowest, top, gains, scales, zeros)
        else:
            middle = (top + 1.0) / 2.0
            if KIND == 1:
                scale = tl.maximum(-low, high) / (middle - 1.0 + span / 2.0)
            else:
                scale = tl.where(high > -low, high, low) / (-middle - span / 2.0)
            gains, scales, zeros = _try(
                w, share, scale, scale * 0.0 + middle, lowest, top, gains, scales, zeros
            )
    for _ in range(REFINE):
        gains, scales, zeros = _try(w, share, scales, zeros, lowest, top, gains, scales, zeros)
    tl.store(out_scales + block, scales, mask=inside)
    tl.store(out_zeros + block, zeros, mask=inside)


_KINDS = {"asymmetric": 0, "symmetric": 1, "full_range": 2}


def fits(grid: Grid) -> bool:
    """Whether ``search_scales`` knows the grid: a block that is a power of two."""
    return 16 <= grid.block <= 256 and grid.block & (grid.block - 1) == 0


def search_scales(
    weight: torch.Tensor,
    grid: Grid,
    first: tuple[torch.Tensor, torch.Tensor | None],
    importance: torch.Tensor | None,
    spans: Sequence[float],
    refinements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (rows, blocks), float32: the whole of ``k_quant``'s search in one kernel.

    Args:
        weight: float32 (rows, columns).
        grid: one that ``fits``.
        first: of ``grid.fit``, to begin with.
        importance: float32 (columns,) or (rows, columns); None for equal ones.
        spans: of ``k_quant.search``.
        refinements: of ``k_quant.search``.
    """
    scales = first[0].contiguous()
    middle = float(grid.middle)
    zeros = torch.full_like(scales, middle) if first[1] is None else first[1].float().contiguous()
    found = torch.empty_like(scales), torch.empty_like(zeros)
    total, count = scales.numel(), _TILE // grid.block
    given = scales if importance is None else importance.float().contiguous()
    _search[(triton.cdiv(total, count),)](
        weight.contiguous(), given, scales, zeros, torch.tensor(spans, device=weight.device), *found,
        total, scales.shape[1], 1.0 if grid.kind == "symmetric" else 0.0, float(grid.top),
        KIND=_KINDS[grid.kind], WEIGHTED=0 if importance is None else importance.dim(), SPANS=len(spans),
        REFINE=refinements, WIDTH=grid.block, COUNT=count,
    )  # fmt: skip
    return found
