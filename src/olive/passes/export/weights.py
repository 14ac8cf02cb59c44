"""Weights of a graph that stay in their mapped files until they are written, a part at a time.

Imported only where torch and onnx-ir already are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype

_PART = 16 << 20  # bytes that are converted and written at once

Release = Callable[[torch.Tensor], object]


class Rows:
    """Tensors that differ in their first dimension alone, one above the other, without a copy.

    Attributes:
        parts: the tensors; what the builder would have concatenated.
        shape: of the whole.
        dtype: of all parts.
    """

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self.parts = tuple(part.detach() for part in parts)
        first = self.parts[0]
        self.dtype = first.dtype
        self.shape = first.shape
        if len(self.parts) > 1:
            self.shape = torch.Size((sum(len(part) for part in self.parts), *first.shape[1:]))

    @property
    def T(self) -> Columns:  # noqa: N802 - the builder asks a weight for it by this name
        """The transpose, not copied either."""
        return Columns(self)

    def whole(self) -> torch.Tensor:
        """One tensor; a copy where there are several parts."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def pieces(self, size: int) -> Iterator[torch.Tensor]:
        """Consecutive views of at most ``size`` elements, or of one row."""
        for part in self.parts:
            if part.numel():
                yield from part.split(max(1, size // part[0].numel()))


class Columns:
    """A transposed matrix.

    Attributes:
        rows: what is transposed, (columns, rows).
        shape: of the transpose.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.dtype = rows.dtype
        self.shape = rows.shape[::-1]


class Weight(ir.LazyTensor):
    """A constant of the graph that is read when it is written.

    Attributes:
        rows: where it comes from.
        transposed: whether the graph holds the transpose of that.
    """

    def __init__(self, rows: Rows, dtype: ir.DataType, name: str, release: Release, *, transposed: bool):
        self.rows, self.transposed, self._release = rows, transposed, release
        self._to = to_torch_dtype(dtype)
        shape = rows.shape[::-1] if transposed else rows.shape
        super().__init__(self._made, dtype=dtype, shape=ir.Shape(shape), name=name)

    def _made(self) -> ir.TensorProtocol:
        whole = self.rows.whole().to(self._to)
        return TorchTensor(whole.T if self.transposed else whole, name=self.name)

    def tobytes(self) -> bytes:
        """The bytes; the pages that they came from are let go."""
        found = super().tobytes()
        self.let_go()
        return found

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes, 16 MiB at a time."""
        for piece in self._pieces():
            file.write(memory(piece.to(self._to)))
        self.let_go()

    def let_go(self) -> None:
        """Drop the mapped pages of all parts."""
        for part in self.rows.parts:
            self._release(part)

    def _pieces(self) -> Iterator[torch.Tensor]:
        parts = self.rows.parts
        each = max(parts[0].element_size(), self._to.itemsize)
        if not self.rows.shape:
            yield parts[0]
        elif not self.transposed:
            for piece in self.rows.pieces(_PART // each):
                yield piece
                self._release(piece)
        else:
            step = max(1, _PART // each // max(self.rows.shape[0], 1))
            for first in range(0, self.rows.shape[1], step):
                yield torch.cat([part[:, first : first + step] for part in parts]).T


def memory(tensor: torch.Tensor) -> Any:
    """The bytes of a tensor in order, copied only where it is not contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def weight(
    value: torch.Tensor | Rows | Columns, name: str, to: ir.DataType | None, release: Release
) -> Weight:
    """What the graph holds for ``value`` in the dtype ``to``, or its own."""
    dtype = from_torch_dtype(value.dtype) if to is None else to
    if isinstance(value, Columns):
        return Weight(value.rows, dtype, name, release, transposed=True)
    if isinstance(value, Rows):
        return Weight(value, dtype, name, release, transposed=False)
    turned = value.dim() == 2 and not value.is_contiguous() and value.T.is_contiguous()
    return Weight(Rows([value.T if turned else value]), dtype, name, release, transposed=turned)


def rows_of(tensor: ir.TensorProtocol) -> Rows:
    """A constant matrix (inputs, outputs) of the graph as rows (outputs, inputs)."""
    if isinstance(tensor, Weight):
        return tensor.rows if tensor.transposed else Rows([part.T for part in [tensor.rows.whole()]])
    if isinstance(tensor, TorchTensor):
        return Rows([tensor.raw.T])
    return Rows([torch.from_numpy(tensor.numpy()).T])
