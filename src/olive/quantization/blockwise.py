"""Block-wise absmax quantisation to NF4, FP4 and int8, as QLoRA trains on it.

NF4 and double quantisation are those of Dettmers et al. 2023 (arXiv:2305.14314), the 8-bit dynamic data type
of the scales that of Dettmers 2015 (arXiv:1511.04561). Every operation is elementwise, a maximum, or a mean
in float64, so that every device gives the same bits. 4-bit codes are those of bitsandbytes; its 8-bit codes
of the scales are one step off at one block in some hundred, next to the middle between two values. Imported
only where torch already is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch

Kind = Literal["nf4", "fp4", "int8"]

# equal shares of a normal distribution's mass, zero among them
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# sign, two bits of exponent, one of mantissa, in order of the bit pattern; in units of 1/192
_FP4 = (0, 1, 128, 192, 64, 96, 32, 48)
_SCALE_BLOCK = 256
_TINY = 1e-38


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are rounded.

    Attributes:
        kind: ``nf4`` or ``fp4`` (4 bits, one scale a block), or ``int8`` (one scale a row).
        block: weights that share a scale; a row for int8, whatever this says.
        double: whether the scales of 4-bit blocks are stored in 8 bits themselves.
    """

    kind: Kind = "nf4"
    block: int = 64
    double: bool = True

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes that a matrix takes."""
        count = rows * columns
        if self.kind == "int8":
            return count + 4 * rows
        scales = -(-count // self.block)
        return -(-count // 2) + (scales + 4 * -(-scales // _SCALE_BLOCK) + 4 if self.double else 4 * scales)


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised matrix.

    Attributes:
        scheme: how it was rounded.
        shape: (rows, columns).
        codes: 4 bits: uint8 (ceil(n / 2),), the earlier weight in the high half; int8: (rows, columns).
        scales: float32, one a block or row; with double quantisation uint8 codes of them.
        outer: float32, scale of each 256 ``scales``; None without double quantisation.
        offset: float32 (), mean of the scales; None without double quantisation.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Quantised:
        """The same on another device."""
        moved = {
            name: None if value is None else value.to(device)
            for name in ("codes", "scales", "outer", "offset")
            for value in (getattr(self, name),)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(
            value.nbytes for value in (self.codes, self.scales, self.outer, self.offset) if value is not None
        )


def quantise(weight: torch.Tensor, scheme: Scheme) -> Quantised:
    """Round a (rows, columns) matrix of any floating dtype."""
    rows, columns = weight.shape
    wide = weight.detach().float()
    if scheme.kind == "int8":
        scales = wide.abs().amax(1).clamp_(min=_TINY).div_(127)
        codes = torch.round(wide / scales[:, None]).clamp_(-127, 127).to(torch.int8)
        return Quantised(scheme, (rows, columns), codes, scales)
    flat = wide.reshape(-1)
    short = -flat.numel() % scheme.block
    blocks = torch.nn.functional.pad(flat, (0, short)).view(-1, scheme.block)
    scales = blocks.abs().amax(1)
    even = flat.numel() + flat.numel() % 2
    scaled = (blocks * (1.0 / scales.clamp(min=_TINY))[:, None]).view(-1)[:even]
    bounds, order = _bounds(scheme.kind, str(weight.device))
    codes = order[torch.bucketize(scaled, bounds)]
    codes = (codes[::2] << 4) | codes[1::2]
    if not scheme.double:
        return Quantised(scheme, (rows, columns), codes, scales)
    offset = scales.double().mean().float()
    eight, outer = _quantise_scales(scales - offset)
    return Quantised(scheme, (rows, columns), codes, eight, outer, offset)


def dequantise(value: Quantised, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The (rows, columns) matrix that ``value`` stands for, computed in float32 and rounded to ``dtype``."""
    scheme, (rows, columns) = value.scheme, value.shape
    if scheme.kind == "int8":
        return (value.codes * value.scales[:, None]).to(dtype)
    pairs = _pairs(scheme.kind, str(value.codes.device))
    flat = pairs[value.codes.int()].view(-1)[: rows * columns]
    scales = block_scales(value)
    if flat.numel() % scheme.block == 0:
        return (flat.view(-1, scheme.block) * scales[:, None]).to(dtype).view(rows, columns)
    return (flat * scales.repeat_interleave(scheme.block)[: flat.numel()]).to(dtype).view(rows, columns)


def block_scales(value: Quantised) -> torch.Tensor:
    """The float32 scale of every block, double quantisation undone."""
    if value.outer is None or value.offset is None:
        return value.scales
    outer = value.outer.repeat_interleave(_SCALE_BLOCK)[: value.scales.numel()]
    return _dynamic(str(value.scales.device))[value.scales.int()] * outer + value.offset


def round_trip(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """``weight`` as it is after quantisation, in float32."""
    return dequantise(quantise(weight, scheme))


def codes_of(kind: Kind, device: str = "cpu") -> torch.Tensor:
    """(16,) float32: what each 4-bit code stands for, in units of the block's scale."""
    if kind == "nf4":
        return torch.tensor(_NF4, device=device)
    positive = torch.tensor(_FP4, dtype=torch.float32, device=device) / 192
    return torch.cat([positive, -positive])


@cache
def dynamic_codes() -> tuple[float, ...]:
    """The 256 values of the signed 8-bit dynamic data type.

    A leading zero of the magnitude moves the decimal point; what bits are left divide [0.1, 1] linearly.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * middles).tolist()
    return tuple(sorted(values))


def _quantise_scales(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit dynamic codes of float32 ``values``, and the scale of each 256 of them."""
    short = -values.numel() % _SCALE_BLOCK
    blocks = torch.nn.functional.pad(values, (0, short)).view(-1, _SCALE_BLOCK)
    outer = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / outer.clamp(min=_TINY))[:, None]).view(-1)[: values.numel()]
    codes = _dynamic(str(values.device))
    # the nearer neighbour; of two as near, the lower
    above = torch.searchsorted(codes, scaled).clamp_(1, len(codes) - 1)
    low, high = codes[above - 1], codes[above]
    return torch.where(scaled - low <= high - scaled, above - 1, above).to(torch.uint8), outer


@cache
def _dynamic(device: str) -> torch.Tensor:
    return torch.tensor(dynamic_codes(), device=device)


@cache
def _bounds(kind: Kind, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where one value of the grid ends and the next begins, and the code of each value in order."""
    codes = codes_of(kind)
    keep = torch.ones(16, dtype=torch.bool)
    if kind == "fp4":
        keep[8] = False  # minus zero
    values, order = codes.masked_fill(~keep, torch.inf).sort()
    count = int(keep.sum())
    bounds = (values[: count - 1] + values[1:count]) / 2
    return bounds.to(device), order[:count].to(torch.uint8).to(device)


@cache
def _pairs(kind: Kind, device: str) -> torch.Tensor:
    """(256, 2): the two weights that each byte stands for."""
    codes = codes_of(kind, device)
    byte = torch.arange(256, device=device)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], 1)
