"""safetensors one tensor at a time: read when asked for, write in a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from olive.errors import InternalError, PassFailed
from olive.models.seen import Seen
from olive.models.tensors import read_header, weight_files

if TYPE_CHECKING:
    import torch

Layout = tuple[str, tuple[int, ...]]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class LazyTensors:
    """The tensors of a model or adapter folder, each loaded when asked for. A context manager.

    Attributes:
        layout: tensor name -> (safetensors dtype code, shape).
        by_file: file name -> its tensor names, in file order.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of ``folder``.

        Raises:
            PassFailed: there is no safetensors file.
            UntrustedInput: a file is truncated or malformed.
        """
        self.folder = folder
        self.layout: dict[str, Layout] = {}
        self.by_file: dict[str, list[str]] = {}
        for path in weight_files(folder):
            header = read_header(path)
            self.layout |= header
            self.by_file[path.name] = list(header)
        if not self.by_file:
            raise PassFailed(f"no safetensors in {folder}", fix="Save the model with safetensors.")
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}

    def __enter__(self) -> Self:
        from safetensors import safe_open

        for name, names in self.by_file.items():
            file = self._stack.enter_context(safe_open(self.folder / name, framework="pt"))
            self._where.update(dict.fromkeys(names, file))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._where.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self.layout

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._where[name].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return self.layout[name][1]

    def code(self, name: str) -> str:
        """Dtype as safetensors names it (``F32``, ``BF16``, ...), from the header."""
        return self.layout[name][0]


class SeenTensors(LazyTensors):
    """The tensors of a base as an adapter's training saw them.

    Args:
        folder: of the base.
        seen: what was done to it; None for nothing.
    """

    def __init__(self, folder: Path, seen: Seen | None) -> None:
        from olive.models.hf import open_model

        self._inner = open_model(folder)[0]
        self.folder, self.layout, self.by_file = folder, self._inner.layout, self._inner.by_file
        self.seen = seen

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._inner[name]
        return stored if self.seen is None else self.seen.tensor(name, stored)


def stored_code(code: str, dtype: str | None) -> str:
    """The code a tensor of ``code`` gets when floating-point tensors are stored as ``dtype``."""
    return _CODES[dtype] if dtype is not None and code in {"F64", "F32", "F16", "BF16"} else code


def stored_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code.

    Raises:
        PassFailed: a dtype that is not copied here: 8-bit floats, packed formats, complex numbers.
    """
    import torch

    if code not in _TORCH:
        raise PassFailed(f"a tensor is stored as {code}", fix="Use a model in floating point.")
    return getattr(torch, _TORCH[code])


def write(path: Path, layout: Mapping[str, Layout], load: Callable[[str], torch.Tensor]) -> int:
    """Write one safetensors file with a single tensor in memory at a time.

    Args:
        path: the file to make.
        layout: tensor name -> (safetensors dtype code, shape), in file order.
        load: gives the tensor called so, already in that dtype and shape.

    Returns:
        Bytes of tensor data written.

    Raises:
        PassFailed: a dtype that cannot be stored.
        InternalError: ``load`` gave another dtype or shape than ``layout`` promised.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (code, shape) in layout.items():
        if code not in _BYTES:
            raise PassFailed(
                f"{name} is stored as {code}, which cannot be copied", fix="Use a model in floating point."
            )
        size = _BYTES[code] * prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, (code, shape) in layout.items():
            tensor = load(name).contiguous()
            if tuple(tensor.shape) != shape or tensor.dtype != getattr(torch, _TORCH[code]):
                raise InternalError(
                    f"{name} came out as {tensor.dtype} {tuple(tensor.shape)}, promised were {code} {shape}"
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return end
