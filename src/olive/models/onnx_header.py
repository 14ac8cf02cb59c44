"""What an ONNX file says of its graph, read without onnx and without a weight.

A reader of the protocol-buffers wire format for the fields that a plan needs. Field numbers: onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from olive.errors import ConfigError, UntrustedInput

DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 8: "STRING", 9: "BOOL", 10: "F16",
    11: "F64", 12: "U32", 13: "U64", 14: "C64", 15: "C128", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ",
    19: "F8_E5M2", 20: "F8_E5M2FNUZ", 21: "U4", 22: "I4", 23: "F4", 24: "F8_E8M0", 25: "U2", 26: "I2",
    27: "F6_E2M3", 28: "F6_E3M2",
}  # fmt: skip
_DEEPEST = 32  # graphs inside graphs


@dataclass(frozen=True, slots=True)
class Node:
    """An operator and the names of what it takes and gives; an input that is left out is empty."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output; sizes are numbers, names, or None where the graph says nothing."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """The main graph of a model.

    Attributes:
        file: name of the file.
        nodes: in their order.
        tensors: initializer -> (dtype, shape).
        inputs, outputs: of the model; initializers are no inputs.
        opsets: domain -> version; of the standard operators "".
        files: external data, names relative to the folder.
    """

    file: str
    nodes: tuple[Node, ...]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    opsets: dict[str, int]
    files: tuple[str, ...]

    def only(self, name: str) -> Value | None:
        """The input called ``name``."""
        return next((value for value in self.inputs if value.name == name), None)


def read_graph(path: Path) -> GraphInfo:
    """Read the graph of an ``.onnx`` file.

    Raises:
        ConfigError: the file is no ONNX model, or is cut short.
        UntrustedInput: a weight lies outside of the model's folder.
    """
    found, reason = None, ""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                found = _Reader(path.name).model(memoryview(data))
            except (ValueError, IndexError) as error:
                reason = str(error)  # the error itself would hold the file open
    except (ValueError, OSError) as error:
        reason = str(error)
    if found is None:
        raise ConfigError(
            f"{path} is no ONNX model: {reason}", where="input_model", fix="Copy or export it again."
        )
    for name in found.files:
        root = path.parent.resolve()
        if Path(name).is_absolute() or root not in (root / name).resolve().parents:
            raise UntrustedInput(
                f"{path.name} has weights outside of its folder: {name!r}",
                where="input_model",
                fix="Keep the weights beside the graph.",
            )
        if not (root / name).is_file():
            raise ConfigError(
                f"{path.name} has weights in {name}, which is not there",
                where="input_model",
                fix="Copy the model with its external data.",
            )
    return found


@dataclass(slots=True)
class _Reader:
    file: str
    nodes: list[Node] = field(default_factory=list)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    opsets: dict[str, int] = field(default_factory=dict)
    files: dict[str, None] = field(default_factory=dict)
    graphs: int = 0

    def model(self, data: memoryview) -> GraphInfo:
        for number, value in _fields(data):
            if number == 7 and isinstance(value, memoryview):
                self.graphs += 1
                self._graph(value)
            elif number == 8 and isinstance(value, memoryview):
                parts = dict(_fields(value))
                domain = _text(parts.get(1, b""))
                self.opsets["" if domain == "ai.onnx" else domain] = _int(parts.get(2, 0))
        if self.graphs != 1 or not self.opsets:
            raise ValueError("it has no graph")
        inputs = tuple(value for value in self.inputs if value.name not in self.tensors)
        return GraphInfo(
            self.file,
            tuple(self.nodes),
            self.tensors,
            inputs,
            tuple(self.outputs),
            self.opsets,
            tuple(self.files),
        )

    def _graph(self, data: memoryview) -> None:
        for number, value in _fields(data):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                self.nodes.append(self._node(value, 0))
            elif number == 5:
                name, dtype, shape = self._tensor(value)
                self.tensors[name] = dtype, shape
            elif number == 11:
                self.inputs.append(_value(value))
            elif number == 12:
                self.outputs.append(_value(value))

    def _node(self, data: memoryview, depth: int) -> Node:
        inputs, outputs, texts = [], [], {3: "", 4: "", 7: ""}
        for number, value in _fields(data):
            if number == 1:
                inputs.append(_text(value))
            elif number == 2:
                outputs.append(_text(value))
            elif number in texts:
                texts[number] = _text(value)
            elif number == 5 and isinstance(value, memoryview):
                self._attribute(value, depth)
        return Node(texts[3], texts[4], texts[7], tuple(inputs), tuple(outputs))

    def _attribute(self, data: memoryview, depth: int) -> None:
        """Only where weights inside an attribute lie."""
        if depth > _DEEPEST:
            raise ValueError("its graphs are nested too deep")
        for number, value in _fields(data):
            if number in (5, 10) and isinstance(value, memoryview):
                self._tensor(value)
            elif number in (6, 11) and isinstance(value, memoryview):
                for inner, part in _fields(value):
                    if inner == 5 and isinstance(part, memoryview):
                        self._tensor(part)
                    elif inner == 1 and isinstance(part, memoryview):
                        self._node(part, depth + 1)

    def _tensor(self, data: memoryview) -> tuple[str, str, tuple[int, ...]]:
        name, dtype, shape = "", 0, []
        for number, value in _fields(data):
            if number == 1:
                shape += list(_varints(value)) if isinstance(value, memoryview) else [_int(value)]
            elif number == 2:
                dtype = _int(value)
            elif number == 8:
                name = _text(value)
            elif number == 13 and isinstance(value, memoryview):
                parts = dict(_fields(value))
                if _text(parts.get(1, b"")) == "location":
                    self.files[_text(parts.get(2, b""))] = None
        return name, DTYPES.get(dtype, "?"), tuple(shape)


def _value(data: memoryview) -> Value:
    name, dtype, shape = "", "?", None
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2 and isinstance(value, memoryview):
            tensor = dict(_fields(value)).get(1)
            if isinstance(tensor, memoryview):
                parts = dict(_fields(tensor))
                dtype = DTYPES.get(_int(parts.get(1, 0)), "?")
                if isinstance(sizes := parts.get(2), memoryview):
                    shape = tuple(_size(size) for _, size in _fields(sizes))
    return Value(name, dtype, shape)


def _size(data: int | memoryview) -> int | str | None:
    if not isinstance(data, memoryview):
        raise ValueError("a size that is none")
    parts = dict(_fields(data))
    if 1 in parts:
        return _int(parts[1])
    return _text(parts[2]) or None if 2 in parts else None


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field of a message: an integer, or the bytes of what has a length."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError(f"wire type {kind} at byte {place}")
            size, place = _varint(data, place)
        if place + size > end:
            raise ValueError("it is cut short")
        yield tag >> 3, data[place : place + size]
        place += size


def _varints(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        yield value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number without end at byte {place}")


def _int(value: int | memoryview | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number belongs")
    return value


def _text(value: int | memoryview | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number where text belongs")
    return bytes(value).decode()
