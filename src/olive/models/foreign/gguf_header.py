"""The header of a GGUF file: metadata and where each tensor lies. No torch, no other package.

Version 2 and 3, little-endian: ``GGUF``, version, counts of tensors and of metadata, then both, then the data
at a multiple of ``general.alignment``. Source: docs/gguf.md of ggml.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from olive.errors import ConfigError, UntrustedInput

# type -> name, weights of a block, bytes of a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136),
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "Copy or download the file again."


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor.

    Attributes:
        kind: its type's name, e.g. ``Q4_0``.
        shape: rows first, as PyTorch names it.
        begin, end: bytes in the file.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata by name, and tensors by name in the order of the file."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read(path: Path) -> Header:
    """The header of a file, held against its size.

    Raises:
        UntrustedInput: it is no GGUF file, truncated or malformed.
        ConfigError: a version or a type of tensor that is not read here.
    """
    size = path.stat().st_size
    if size < 24:
        raise UntrustedInput(f"{path} is no GGUF file: {size} bytes", fix=_AGAIN)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(path, data).header()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, KeyError) as error:
            raise UntrustedInput(f"{path} is truncated or malformed: {error!r}", fix=_AGAIN) from error


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def header(self) -> Header:
        if self.data[:4] != b"GGUF":
            raise UntrustedInput(f"{self.path} is no GGUF file", fix=_AGAIN)
        self.place = 4
        version = self._one("I")
        if version not in (2, 3):
            raise ConfigError(f"{self.path} is GGUF version {version}; 2 and 3 are read here", fix=_AGAIN)
        tensors, entries = self._one("Q"), self._one("Q")
        if max(tensors, entries) > 1 << 20:
            raise UntrustedInput(f"{self.path} claims {tensors} tensors", fix=_AGAIN)
        metadata = {self._string(): self._value(self._one("I")) for _ in range(entries)}
        found = [(self._string(), self._info()) for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.place // alignment) * alignment
        return Header(metadata, {name: self._tensor(name, start, *info) for name, info in found})

    def _info(self) -> tuple[tuple[int, ...], int, int]:
        count = self._one("I")
        if count > 8:
            raise UntrustedInput(f"{self.path} has a tensor of {count} dimensions", fix=_AGAIN)
        shape = tuple(self._one("Q") for _ in range(count))[::-1]
        return shape, self._one("I"), self._one("Q")

    def _tensor(self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
        if kind not in TYPES:
            raise ConfigError(
                f"{name} of {self.path} is of type {kind}, which is not read here",
                where="input_model",
                fix=f"Use a file of {', '.join(sorted(name for name, *_ in TYPES.values()))}.",
            )
        named, block, size = TYPES[kind]
        count = prod(shape)
        begin = start + offset
        end = begin + count // block * size
        if count % block or (shape and shape[-1] % block) or end > len(self.data):
            raise UntrustedInput(f"{name} of {self.path} reaches beyond the file", fix=_AGAIN)
        return Stored(named, shape, begin, end)

    def _one(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.place)
        self.place += struct.calcsize(f"<{form}")
        return value

    def _string(self) -> str:
        size = self._one("Q")
        begin, self.place = self.place, self.place + size
        if self.place > len(self.data):
            raise UntrustedInput(f"{self.path} is truncated", fix=_AGAIN)
        return self.data[begin : self.place].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._one(_SCALARS[kind])
        inner, count = self._one("I"), self._one("Q")
        if inner == _STRING:
            if count > len(self.data) // 8:
                raise UntrustedInput(f"{self.path} claims a list of {count} texts", fix=_AGAIN)
            return [self._string() for _ in range(count)]
        if inner == _ARRAY:
            return [self._value(_ARRAY) for _ in range(min(count, 1 << 16))]
        form = f"<{count}{_SCALARS[inner]}"
        if struct.calcsize(form) > len(self.data):
            raise UntrustedInput(f"{self.path} claims a list of {count} numbers", fix=_AGAIN)
        values = list(struct.unpack_from(form, self.data, self.place))
        self.place += struct.calcsize(form)
        return values
