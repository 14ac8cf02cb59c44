"""Learned rounding: an offset before each rounding and a factor on each end of a block, by signed gradients.

SignRound (Cheng et al. 2023, arXiv:2309.05516). The gradient passes straight through every rounding (Bengio
et al. 2013), and a step is the learning rate times the gradient's sign. Nothing here waits for the device.
Imported only where torch already is.
"""

from __future__ import annotations

import torch

from olive.quantization.grid import Grid, Quantised

LEAST = 0.5  # of the factors: a block's range is cut to half at most
_TINY = 1e-12


class LearnedRounding:
    """The rounding of one matrix, with what is learned of it.

    A weight's code is ``round(w / s + v) + z``. Of an ``asymmetric`` grid the ends of a block are
    ``low * a`` and ``high * b``, which give ``s = (high b - low a) / top`` and ``z = round(-low a / s)``; of
    the others the scale is that of the start times ``a``.

    Args:
        weight: float32 (rows, columns).
        grid: with integer zero points.
        start: whose scales and zero points are those of the factors 1; the extremes of a block where None.
        clip: whether the factors are learned too.

    Attributes:
        offsets: ``v``, float32 (rows, blocks, width), within [-0.5, 0.5].
        factors: float32 (2, rows, blocks), or (1, rows, blocks) without zero points.
    """

    def __init__(
        self, weight: torch.Tensor, grid: Grid, start: Quantised | None = None, clip: bool = True
    ) -> None:
        if grid.float_zero:
            raise ValueError("rounding is learned for integer zero points")
        rows, columns = weight.shape
        self.grid, self.shape, self.clip = grid, weight.shape, clip
        self.weight = weight.detach().float().reshape(rows, -1, grid.width(columns))
        low, high = self.weight.amin(-1), self.weight.amax(-1)
        self.most = 1.0 if start is None else 1.0 / LEAST**0.5
        if grid.kind == "asymmetric":
            if start is None:
                self._low, self._high = low.clamp(max=0), high.clamp(min=0)
            else:
                zeros = torch.zeros_like(low) if start.zeros is None else start.zeros.float()
                self._low, self._high = -zeros * start.scales, (grid.top - zeros) * start.scales
        elif start is not None:
            self._scales = start.scales.clone()
        elif grid.kind == "full_range":
            self._scales = torch.where(high.abs() > low.abs(), high, low) / -float(grid.middle)
        else:
            self._scales = torch.maximum(-low, high) / max(grid.middle - 1, 1)
        ends = 2 if grid.kind == "asymmetric" else 1
        self.offsets = torch.zeros_like(self.weight).requires_grad_()
        self.factors = torch.ones(ends, *low.shape, device=weight.device).requires_grad_(clip)

    @property
    def learned(self) -> list[torch.Tensor]:
        """The tensors that a step changes."""
        return [self.offsets, self.factors] if self.clip else [self.offsets]

    def forward(self) -> torch.Tensor:
        """The (rows, columns) float32 weight that the codes stand for, with a gradient."""
        codes, scales, zeros = self._codes()
        return ((codes - zeros) * scales).view(self.shape)

    @torch.no_grad()
    def step(self, rate: torch.Tensor | float, clip_rate: torch.Tensor | float) -> None:
        """One step against the sign of the gradients, which are forgotten."""
        if self.offsets.grad is not None:
            self.offsets.sub_(self.offsets.grad.sign_().mul_(rate)).clamp_(-0.5, 0.5)
            self.offsets.grad = None
        if self.clip and self.factors.grad is not None:
            self.factors.sub_(self.factors.grad.sign_().mul_(clip_rate)).clamp_(LEAST, self.most)
            self.factors.grad = None

    @torch.no_grad()
    def quantised(self) -> Quantised:
        """Codes, scales and zero points of what is learned so far."""
        codes, scales, zeros = self._codes()
        points = zeros[..., 0].to(torch.uint8) if isinstance(zeros, torch.Tensor) else None
        return Quantised(self.grid, codes.to(torch.uint8).view(self.shape), scales[..., 0].clone(), points)

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Codes (rows, blocks, width), scales and zero points (rows, blocks, 1)."""
        zeros: torch.Tensor | float = float(self.grid.middle)
        if self.grid.kind == "asymmetric":
            low, high = self._low * self.factors[0], self._high * self.factors[1]
            scales = (high - low)[..., None] / self.grid.top
            zeros = _round(-low[..., None] / scales.clamp(min=_TINY)).clamp(0, self.grid.top)
        else:
            scales = (self._scales * self.factors[0])[..., None]
        safe = torch.where(scales.abs() < _TINY, _TINY, scales)
        lowest = 1 if self.grid.kind == "symmetric" else 0
        codes = (_round(self.weight / safe + self.offsets) + zeros).clamp(lowest, self.grid.top)
        return codes, scales, zeros


def _round(value: torch.Tensor) -> torch.Tensor:
    """The nearest integer; the gradient is that of ``value``."""
    return value + (value.round() - value).detach()


@torch.no_grad()
def pull_back(weight: torch.Tensor, grid: Grid, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient by a matrix of what ``round_to_nearest`` makes of it.

    Roundings pass it straight through, and it goes into the extremes of each block, which decide the scale s:
    a weight w with code c moves with s by ``c - z - w / s``; one that is cut off at an end of the grid moves
    with scale and zero point z alone.

    Args:
        weight: float32 (rows, columns).
        grid: with integer zero points.
        gradient: by what the codes stand for, same shape.
    """
    if grid.float_zero:
        raise ValueError("gradients are known for integer zero points")
    rows, columns = weight.shape
    blocks = weight.reshape(rows, -1, grid.width(columns))
    given = gradient.reshape(blocks.shape)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    lowest, highest = low, high
    two_ends = grid.kind == "asymmetric"
    negative = high.abs() <= low.abs()  # of the other kinds: which end decides
    if two_ends:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / grid.top
    elif grid.kind == "full_range":
        scales = torch.where(negative, low, high) / -float(grid.middle)
    else:
        scales = torch.maximum(-low, high) / max(grid.middle - 1, 1)
    inverse = torch.where(scales.abs() < _TINY, 0.0, 1.0 / scales)
    zeros = (-low * inverse).round() if two_ends else torch.full_like(scales, float(grid.middle))
    steps = blocks * inverse
    codes = steps.round().add_(zeros)
    inside = (codes >= 0) & (codes <= grid.top)
    steps.mul_(inside).neg_().add_(codes.clamp_(0, grid.top)).sub_(zeros)
    by_scale = (steps * given).sum(-1, keepdim=True)
    made = given * inside
    if two_ends:
        cut = (given.sum(-1, keepdim=True) - made.sum(-1, keepdim=True)) * -scales  # by the zero point
        by_scale = by_scale + cut * low * inverse.square()
        by_low = -by_scale / grid.top - cut * inverse
        _add_where(made, blocks, lowest, torch.where(low < 0, by_low, 0.0))
        _add_where(made, blocks, highest, torch.where(high > 0, by_scale / grid.top, 0.0))
    elif grid.kind == "full_range":
        _add_where(made, blocks, torch.where(negative, lowest, highest), by_scale / -float(grid.middle))
    else:
        signed = torch.where(negative, -by_scale, by_scale) / max(grid.middle - 1, 1)
        _add_where(made, blocks, torch.where(negative, lowest, highest), signed)
    return made.view(rows, columns)


def _add_where(made: torch.Tensor, blocks: torch.Tensor, extreme: torch.Tensor, value: torch.Tensor) -> None:
    """Add a block's value to the weight that is its extreme; those that share it share the value."""
    mask = (blocks == extreme).float()
    made.addcmul_(mask, value / mask.sum(-1, keepdim=True))
