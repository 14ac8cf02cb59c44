"""Search of scale and integer zero point together, by the error they leave.

A k-quant fits a scale and a real minimum to each block and then rounds the minimum to a zero point, which
spoils the scale. Here a zero point is a code from the start. For a scale that is tried, every weight has an
integer ``n = round(w / s)`` that does not depend on the zero point ``z``; the code range only cuts it off to
``[-z, top - z]``. For what is left the best scale is known in closed form, ``sum h w n / sum h n^2``, and so
is the error at it, ``sum h w^2 - (sum h w n)^2 / sum h n^2``. So each candidate costs a few passes over a
block, and the winner is rounded once more on its own scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from olive.quantization.grid import Grid, Quantised, encode, fit
from olive.quantization.threads import one_thread_an_operation

# steps that the block's range is divided into, as an offset to the highest code
SPANS = (-0.9, -0.3, 0.0, 0.35, 0.7, 1.1)
_WEIGHTS = 1 << 17  # of a part on a CPU: its buffers stay in one core's caches


def search(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor | None = None,
    spans: Sequence[float] = SPANS,
    refinements: int = 1,
) -> Quantised:
    """Quantise with the scale and zero point of least (weighted) squared error that were tried.

    Args:
        weight: (rows, columns) of any floating dtype.
        grid: with integer zero points, or symmetric.
        importance: float32 (columns,) or (rows, columns), not negative: weight of each squared error; equal
            where None.
        spans: scales to try, as offsets to the highest code: range / (top + span).
        refinements: how often the winner's scale is fitted to its codes and its codes to the scale.

    Returns:
        Codes, scales and zero points; never worse in that error than ``round_to_nearest``.
    """
    if grid.float_zero:
        raise ValueError("the search is for integer zero points; real ones have a closed form of their own")
    rows, columns = weight.shape
    width = grid.width(columns)
    if weight.is_cuda:
        from olive.quantization import gpu_kernels

        if gpu_kernels.fits(grid):
            wide = weight.float()
            scales, zeros = gpu_kernels.search_scales(
                wide, grid, fit(wide, grid), importance, spans, refinements
            )
            points = zeros.to(torch.uint8) if grid.kind == "asymmetric" else None
            return Quantised(grid, encode(wide, grid, scales, zeros), scales, points)
    scales = torch.empty(rows, columns // width, device=weight.device)
    zeros = torch.empty_like(scales)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    step = max(1, _WEIGHTS // columns) if weight.device.type == "cpu" else rows

    def one(first: int) -> None:
        part = slice(first, first + step)
        share = None
        if importance is not None:
            share = importance[part] if importance.dim() == 2 else importance.expand(len(scales[part]), -1)
        scales[part], zeros[part] = _part(weight[part], grid, share, spans, refinements)
        codes[part] = encode(weight[part], grid, scales[part], zeros[part])

    firsts = range(0, rows, step)
    if weight.device.type == "cpu" and len(firsts) > 1:
        with one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, firsts))
    else:
        for first in firsts:
            one(first)
    points = zeros.to(torch.uint8) if grid.kind == "asymmetric" else None
    return Quantised(grid, codes, scales, points)


def _part(
    weight: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor | None,
    spans: Sequence[float],
    refinements: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points (rows, blocks), float32, of some rows."""
    rows, columns = weight.shape
    width = grid.width(columns)
    # one block a column: reductions over the first dimension run along the vector units
    wide = weight.float().reshape(-1, width).T.contiguous()
    shares = None if importance is None else importance.float().reshape(-1, width).T.contiguous()
    first_scales, first_zeros = fit(weight, grid)
    search = _Search(wide, shares, grid, first_scales.reshape(-1), first_zeros)
    for scale, zero in _candidates(wide, grid, spans):
        search.consider(scale, zero)
    for _ in range(refinements):
        search.refine()
    shape = (rows, columns // width)
    return search.scales.view(shape), search.zeros.view(shape)


def _candidates(
    wide: torch.Tensor, grid: Grid, spans: Sequence[float]
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Scales (blocks,), each with the zero points to try on it."""
    low, high = wide.amin(0), wide.amax(0)
    if grid.kind == "asymmetric":
        low, high = low.clamp_(max=0), high.clamp_(min=0)
        spread = high - low
        for span in spans:
            scale = spread / (grid.top + span)
            exact = -low / scale
            # what the range is short of or has to spare is shared between both ends
            below = (exact - 0.5 * span).floor_().nan_to_num_(0.0)
            yield scale, (below.clamp(0, grid.top), (below + 1).clamp_(0, grid.top))
        return
    middle = torch.full_like(low, float(grid.middle))
    ends = (
        (torch.where(high > -low, high, low),) if grid.kind == "full_range" else (torch.maximum(-low, high),)
    )
    reach = -grid.middle if grid.kind == "full_range" else grid.middle - 1
    for end in ends:
        for span in spans:
            yield end / (reach + (span if reach > 0 else -span) / 2), (middle,)


class _Search:
    """The best of what was considered, one candidate a block at a time; buffers are used again."""

    def __init__(
        self,
        wide: torch.Tensor,
        shares: torch.Tensor | None,
        grid: Grid,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
    ) -> None:
        self.wide, self.shares, self.grid = wide, shares, grid
        self.weighted = wide if shares is None else wide * shares
        self.scales = scales.clone()
        self.zeros = (
            torch.full_like(scales, float(grid.middle)) if zeros is None else zeros.reshape(-1).float()
        )
        self.lowest = 1 if grid.kind == "symmetric" else 0
        self._n, self._cut, self._product = (torch.empty_like(wide) for _ in range(3))
        # what a candidate takes off sum h w^2; larger is better
        self.gains = self._gain_as_is()

    def _gain_as_is(self) -> torch.Tensor:
        """Of the scales given, which are not the best for their codes: 2 s sum h w n - s^2 sum h n^2."""
        self._round(self.scales)
        along, own = self._sums(self.zeros)
        return 2 * self.scales * along - self.scales.square() * own

    def _round(self, scales: torch.Tensor) -> None:
        inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
        torch.mul(self.wide, inverse, out=self._n).round_()

    def _sums(self, zeros: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sums over a block, h w n and h n^2, with n cut off to the codes."""
        torch.clamp(self._n, self.lowest - zeros, self.grid.top - zeros, out=self._cut)
        along = torch.mul(self.weighted, self._cut, out=self._product).sum(0)
        if self.shares is None:
            return along, self._cut.square_().sum(0)
        return along, self._cut.square_().mul_(self.shares).sum(0)

    def consider(self, scales: torch.Tensor, points: Sequence[torch.Tensor]) -> None:
        """Try scales (blocks,) with each of the zero points; keep what is better."""
        self._round(scales)
        for zeros in points:
            along, own = self._sums(zeros)
            fitted = along / own
            self._keep(along * fitted, fitted, zeros)

    def refine(self) -> None:
        """Round on the scales found, and fit the scales to those codes."""
        self._round(self.scales)
        along, own = self._sums(self.zeros)
        fitted = along / own
        self._keep(along * fitted, fitted, self.zeros)

    def _keep(self, gains: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        better = gains > self.gains  # false for NaN, as of a block of zeros
        self.gains = torch.where(better, gains, self.gains)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)


def magnitudes(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """An importance without data, (rows, columns): the block's root mean square plus the weight's magnitude.

    The one that llama.cpp's k-quants use.
    """
    rows, columns = weight.shape
    blocks = weight.float().reshape(rows, -1, grid.width(columns))
    return (blocks.abs() + blocks.square().mean(-1, keepdim=True).sqrt()).view(rows, columns)
