"""Uniform grids: blocks of weights that share a scale and a zero point.

A weight is ``(code - zero) * scale``, with a code of ``bits`` bits. Blocks lie along a row, that is along the
inputs of a linear layer, as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them. Everything is
elementwise or a reduction over a block, on whatever device the weights are. Imported only where torch already
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["asymmetric", "symmetric", "full_range"]

_BELOW_HALF = 0.49999997  # the largest float32 below 0.5: added and cut off, it rounds halves away from zero


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a block may take.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        block: weights that share a scale; -1 for a whole row (per channel).
        kind: ``asymmetric``: a zero point a block. ``symmetric``: the zero point is the middle code, and the
            scale is the largest magnitude over the positive codes, so that the lowest code stays unused.
            ``full_range``: the same zero point, a scale of either sign that puts the weight of largest
            magnitude on the lowest code.
        float_zero: asymmetric only: zero points are real numbers, not codes.
    """

    bits: int = 4
    block: int = 32
    kind: Kind = "asymmetric"
    float_zero: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"grids have 2, 3, 4 or 8 bits, not {self.bits}")
        if self.block != -1 and self.block < 2:
            raise ValueError(f"a block has at least 2 weights, or is -1 for a row; got {self.block}")
        if self.float_zero and self.kind != "asymmetric":
            raise ValueError(f"a {self.kind} grid has no zero points that could be real numbers")

    @property
    def top(self) -> int:
        """The highest code; the lowest is 0."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a grid without one of its own."""
        return int(2 ** (self.bits - 1))

    def width(self, columns: int) -> int:
        """Weights of a block in rows of ``columns``.

        Raises:
            ValueError: blocks do not divide the row.
        """
        width = columns if self.block == -1 else self.block
        if columns % width:
            raise ValueError(f"rows of {columns} weights do not divide into blocks of {width}")
        return width


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised matrix, not packed.

    Attributes:
        grid: its grid.
        codes: uint8 (rows, columns).
        scales: float32 (rows, blocks).
        zeros: uint8, or float32 where the grid says so, (rows, blocks); None for the middle code.
    """

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def dequantise(self) -> torch.Tensor:
        """(rows, columns) float32."""
        rows, columns = self.codes.shape
        blocks = self.codes.view(rows, self.scales.shape[1], -1).float()
        zeros = float(self.grid.middle) if self.zeros is None else self.zeros.float()[..., None]
        return ((blocks - zeros) * self.scales[..., None]).view(rows, columns)


def fit(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points from the extremes of each block.

    An integer zero point stands for 0 exactly, so a block that lies on one side of 0 is widened to it. With
    4 and 8 bits ``asymmetric`` and ``full_range`` give the bits of ONNX Runtime's own quantiser.

    Args:
        weight: (rows, columns), any floating dtype.
        grid: the grid.

    Returns:
        Scales (rows, blocks) float32, and zero points as in ``Quantised``.
    """
    blocks = _blocks(weight, grid)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if grid.kind == "asymmetric":
        if not grid.float_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / grid.top
        flat = scales == 0
        if grid.float_zero:
            # a constant block: code 0, one step of its own size away from zero
            scales = torch.where(flat, torch.where(low == 0, 1.0, low.abs()), scales)
            return scales, -low / scales
        zeros = nearest(-low / torch.where(flat, 1.0, scales)).clamp_(0, grid.top)
        return scales, zeros.to(torch.uint8)
    if grid.kind == "symmetric":
        return torch.maximum(-low, high) / max(grid.middle - 1, 1), None
    return torch.where(high.abs() > low.abs(), high, low) / -float(grid.middle), None


def encode(
    weight: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """The nearest codes, uint8 (rows, columns), of weights on given scales and zero points."""
    blocks = _blocks(weight, grid)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]
    centre = float(grid.middle) if zeros is None else zeros.float()[..., None]
    # as ``nearest``, but for what is below 0, which the lowest code cuts off; the conversion truncates
    codes = (blocks * inverse).add_(centre).add_(_BELOW_HALF).clamp_(0, grid.top)
    return codes.to(torch.uint8).view(weight.shape)


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Quantised:
    """Every weight to the nearest value of the grid that the extremes of its block give."""
    scales, zeros = fit(weight, grid)
    return Quantised(grid, encode(weight, grid, scales, zeros), scales, zeros)


def nearest(value: torch.Tensor) -> torch.Tensor:
    """Round a float32 tensor, halves away from zero, as C's ``roundf``; in place."""
    return value.add_(value.sign().mul_(_BELOW_HALF)).trunc_()


def _blocks(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.detach().float().reshape(rows, -1, grid.width(columns))
