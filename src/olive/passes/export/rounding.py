"""A matrix to the packed bytes of MatMulNBits, on every processor, as the builder's quantisers round it.

``default`` and ``rtn`` give the integers, scales and zero points of onnxruntime's quantisers, bit for bit;
``k_quant`` searches scale and integer zero point together. Imported only where torch already is.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import torch

from olive.passes.export.weights import Release, Rows
from olive.quantization.grid import Grid, encode, fit
from olive.quantization.k_quant import magnitudes, search
from olive.quantization.packing import pack
from olive.quantization.threads import one_thread_an_operation

Method = Literal["default", "rtn", "k_quant"]
# weights of a piece: few enough for a core's caches and for all cores to have some, enough for their start
_LEAST, _MOST = 1 << 16, {"default": 1 << 19, "rtn": 1 << 19, "k_quant": 1 << 17}
_KEPT = 1 << 23  # weights after which mapped pages are let go
_Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Packed(NamedTuple):
    """The three inputs of MatMulNBits.

    Attributes:
        weight: uint8 (rows, blocks, bytes of a block).
        scales: (rows, blocks), in the dtype of the graph.
        zeros: uint8 (rows, bytes); None for the middle code.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a matrix is rounded.

    Attributes:
        method: whose rule.
        bits: 4 or 8.
        block: weights that share a scale.
        symmetric: no zero points; ``k_quant`` has them always.
        dtype: of the graph: float32, float16, or for ``default`` bfloat16; weights are cast to it first.
    """

    method: Method
    bits: int
    block: int
    symmetric: bool
    dtype: torch.dtype

    @property
    def zeros(self) -> bool:
        """Whether there are zero points."""
        return self.method == "k_quant" or not self.symmetric

    def shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of weight, scales and zero points."""
        blocks = -(-columns // self.block)
        packed = self.block * self.bits // 8
        return (rows, blocks, packed), (rows, blocks), (rows, -(-blocks * self.bits // 8))

    def matrix(self, rows: Rows, release: Release) -> Packed:
        """Round a matrix (rows, columns) of any floating dtype."""
        count, columns = rows.shape
        shapes = self.shapes(count, columns)
        weight = torch.empty(shapes[0], dtype=torch.uint8)
        scales = torch.empty(shapes[1], dtype=self.dtype)
        zeros = torch.empty(shapes[2], dtype=torch.uint8) if self.zeros else None

        spare = shapes[2][1] * 8 // self.bits - shapes[1][1]  # zero points that only fill the last byte

        def one(place: tuple[int, torch.Tensor]) -> None:
            first, piece = place
            last = first + len(piece)
            codes, step, points = self._codes(piece)
            weight[first:last] = pack(codes, self.bits).view(last - first, *shapes[0][1:])
            scales[first:last] = step
            if zeros is not None and points is not None:
                points = torch.nn.functional.pad(points, (0, spare), value=8)
                zeros[first:last] = pack(points, self.bits)

        with one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
            share = max(_LEAST, count * columns // (2 * threads))
            each = max(1, min(share, _MOST[self.method]) // columns) * columns
            placed = _placed(rows, each)
            while some := list(islice(placed, max(threads, _KEPT // each))):
                list(pool.map(one, some))
                for _, piece in some:
                    release(piece)
        for part in rows.parts:
            release(part)
        return Packed(weight, scales, zeros)

    def _codes(self, piece: torch.Tensor) -> _Codes:
        """Codes (rows, padded columns) uint8, scales and zero points (rows, blocks) of some rows."""
        cast = piece.to(self.dtype)
        if short := -cast.shape[1] % self.block:
            cast = torch.nn.functional.pad(cast, (0, short))
        if self.method == "rtn":
            return _rtn(cast, self)
        wide = cast.float()
        if self.method == "k_quant":
            grid = Grid(self.bits, self.block, "asymmetric")
            found = search(wide, grid, magnitudes(wide, grid))
            if self.dtype == torch.float32:
                return found.codes, found.scales, found.zeros
            scales = found.scales.to(self.dtype)
            return encode(wide, grid, scales.float(), found.zeros), scales, found.zeros
        grid = Grid(self.bits, self.block, "full_range" if self.symmetric else "asymmetric")
        scales, zeros = fit(wide, grid)
        # onnxruntime rounds by the scale that float16 leaves, but a bfloat16 only after it has rounded
        used = scales.to(self.dtype).float() if self.dtype == torch.float16 else scales
        codes = encode(wide, grid, used, zeros)
        codes[:, piece.shape[1] :] = 0
        return codes, scales.to(self.dtype), zeros


def _placed(rows: Rows, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    first = 0
    for piece in rows.pieces(size):
        yield first, piece
        first += len(piece)


def _rtn(weight: torch.Tensor, how: Rounding) -> _Codes:
    """As onnxruntime's numpy code: float64 from the scale on, blocks that do not reach 0 keep their range."""
    top = 2**how.bits - 1
    blocks = weight.view(len(weight), -1, how.block)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if how.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        scales = torch.where(reach > 0, (reach * 2.0).double() / top, 1.0)
        zeros = torch.full_like(scales, 2.0 ** (how.bits - 1))
    else:
        scales = torch.where(low != high, (high - low).double() / top, 1.0)
        zeros = ((0.0 - low.double()) / scales).round_().clamp_(0, top)
    codes = blocks.double().div_(scales[..., None]).add_(zeros[..., None]).round_().clamp_(0, top)
    points = None if how.symmetric else zeros.to(torch.uint8)
    return codes.to(torch.uint8).view(weight.shape), scales.to(weight.dtype), points
