"""A tensor as its bytes: in the graph's file, or in a file of weights beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from onnx import TensorProto

_INSIDE = 1024  # bytes of a weight that stays in the graph's own file
_PAGE, _ALLOCATION = 4096, 65536  # offsets that a reader can map: Linux, Windows


class Stored(NamedTuple):
    """A weight as it is stored.

    Attributes:
        data: array; of 4-bit types the bytes, two values in each, the first in the low half.
        data_type: ``TensorProto.DataType``.
        dims: shape of the tensor.
    """

    data: np.ndarray
    data_type: int
    dims: tuple[int, ...]


def from_buffer(data: Any, dtype: str) -> np.ndarray:
    """A view of bytes as a vector."""
    import numpy as np

    return np.frombuffer(data, dtype)


def shares_bytes(data_type: int) -> bool:
    """Whether several values share a byte."""
    return bits_of(data_type) < 8


def bits_of(data_type: int) -> int:
    """Bits of a value of a ``TensorProto.DataType``."""
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    narrow = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    name = TensorProto.DataType.Name(data_type)
    return narrow.get(name) or 8 * int(tensor_dtype_to_np_dtype(data_type).itemsize)


def byte_count(tensor: TensorProto) -> int:
    """Bytes of a tensor, by its type and shape."""
    count = 1
    for size in tensor.dims:
        count *= size
    return -(-count * bits_of(tensor.data_type) // 8)


def write_tensor(file: Any, tensor: TensorProto, data: np.ndarray) -> None:
    """Put ``data`` into the tensor, or into the file and its place into the tensor."""
    import numpy as np

    data = np.ascontiguousarray(data)
    if data.nbytes < _INSIDE:
        tensor.raw_data = data.tobytes()
        return
    step = _ALLOCATION if data.nbytes >= 1 << 20 else _PAGE
    offset = -(-file.tell() // step) * step
    file.seek(offset)
    file.write(data.reshape(-1).view(np.uint8).data)
    tensor.data_location = 1
    for key, value in (("location", Path(file.name).name), ("offset", offset), ("length", data.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
