"""An ONNX model whose weights stay on disk while its graph is changed, and are streamed when it is written.

The graph is read without external data; an initializer is a view of its mapped file. What a pass puts in its
place is made when the new file of weights is written, so that about one matrix is in memory at a time.
Format: onnx.proto3 of ONNX, section External Data.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from olive.errors import ConfigError, PassFailed, UntrustedInput
from olive.models.artifact import Artifact
from olive.store.copying import copy_file

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_INSIDE = 1024  # bytes of a weight that stays in the graph's own file
_PAGE, _ALLOCATION = 4096, 65536  # offsets that a reader can map: Linux, Windows
_AGAIN = "Copy or export the model again."


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


@dataclass(slots=True)
class _Source:
    """How some weights are made: names, and the function that makes all of them, in that order."""

    names: tuple[str, ...]
    make: Callable[[], tuple[Stored, ...]]


def graph_file(folder: Path) -> Path:
    """The graph of a model folder: of a bundle its decoder, else the only ``*.onnx``.

    Raises:
        ConfigError: none, or several.
    """
    bundle = folder / "genai_config.json"
    if bundle.is_file():
        name = json.loads(bundle.read_text(encoding="utf-8"))["model"]["decoder"]["filename"]
        return folder / str(name)
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"{folder} holds no single ONNX graph: {names}", fix="Name the file in model_path.")
    return found[0]


def open_graph(model: Artifact) -> Graph:
    """The graph of an artifact; of one whose document names a file, that file alone is the model."""
    named = model.attributes.get("file")
    if named is None:
        return Graph(graph_file(model.path))
    return Graph(model.path / str(named), alone=True)


class Graph:
    """An ONNX model, its weights on disk.

    Args:
        path: the ``.onnx`` file.
        alone: whether what else is in its folder is no part of the model.

    Attributes:
        model: the ModelProto; weights with external data have none in memory.
        weights: name -> TensorProto of the initializers of the main graph, in their order. Constants in nodes
            of the main graph are among them.

    Raises:
        ConfigError: the file is no ONNX model.
        UntrustedInput: external data outside of the model's folder.
        PassFailed: external data shorter than the graph says.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        import onnx
        from google.protobuf.message import DecodeError

        self.path, self.alone = path, alone
        try:
            self.model: ModelProto = onnx.load(path, load_external_data=False)
        except (DecodeError, OSError) as error:
            raise ConfigError(f"{path} is no ONNX model: {error}", fix=_AGAIN) from error
        self._maps: dict[Path, mmap.mmap] = {}
        self._sources: dict[str, _Source] = {}
        self._load_inner()
        self._lift_constants()
        self.weights: dict[str, TensorProto] = {one.name: one for one in self.graph.initializer}
        for tensor in self.weights.values():
            if self._is_outside(tensor):
                self._place(tensor)

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return max(
            (one.version for one in self.model.opset_import if one.domain in ("", "ai.onnx")), default=1
        )

    def need_opset(self, domain: str, version: int) -> None:
        """Declare a domain of operators, or raise its version; of the standard ones call the converter."""
        for one in self.model.opset_import:
            if one.domain == domain:
                one.version = max(one.version, version)
                return
        self.model.opset_import.add(domain=domain, version=version)

    @property
    def files(self) -> set[Path]:
        """The graph's file and the files of its external data."""
        return {self.path, *(self._place(t)[0] for t in self.weights.values() if self._is_outside(t))}

    def array(self, name: str) -> np.ndarray:
        """A weight as it is now; read-only, a view of its file where it has one. 4-bit types: their bytes."""
        source = self._sources.get(name)
        if source is not None:
            return source.make()[source.names.index(name)].data
        from onnx import numpy_helper
        from onnx.helper import tensor_dtype_to_np_dtype

        tensor = self.weights[name]
        if not self._is_outside(tensor):
            if _packed(tensor.data_type) and tensor.raw_data:
                return _frombuffer(tensor.raw_data, "uint8")
            return numpy_helper.to_array(tensor)
        path, offset, length = self._place(tensor)
        raw = _frombuffer(memoryview(self._map(path))[offset : offset + length], "uint8")
        if _packed(tensor.data_type):
            return raw
        return raw.view(tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight of the model as it was read."""
        return tuple(self.weights[name].dims)

    def put(self, names: tuple[str, ...], make: Callable[[], tuple[Stored, ...]]) -> None:
        """Add weights, or put others in the place of those of these names.

        Args:
            names: of the initializers.
            make: gives them, in this order; called once when the model is written.
        """
        from onnx import TensorProto

        source = _Source(names, make)
        for name in names:
            self.weights.setdefault(name, TensorProto(name=name))
            self._sources[name] = source

    def put_array(self, name: str, value: np.ndarray) -> None:
        """Add a small weight, or put another in its place."""
        from onnx.helper import np_dtype_to_tensor_dtype

        stored = Stored(value, np_dtype_to_tensor_dtype(value.dtype), value.shape)
        self.put((name,), lambda: (stored,))

    def drop_unused(self) -> None:
        """Forget weights that nothing reads."""
        read = {output.name for output in self.graph.output} | set(_inputs(self.graph))
        for name in [name for name in self.weights if name not in read]:
            del self.weights[name]
            self._sources.pop(name, None)

    def readers(self, name: str) -> list[NodeProto]:
        """Nodes of the main graph that take the value ``name``."""
        return [node for node in self.graph.node if name in node.input]

    def save(
        self, folder: Path, name: str | None = None, *, done: Callable[[str], None] = lambda _: None
    ) -> Path:
        """Write the model to ``folder``: the graph, and beside it ``<name>.data`` with its weights.

        Args:
            folder: not the one it was read from.
            name: of the graph's file; default: as it was.
            done: told the name of each weight that is written.

        Raises:
            PassFailed: a weight is NaN where the one it stands for was not, or the disk is full.
        """
        from onnx import TensorProto

        path = folder / (name or self.path.name)
        data = path.with_name(path.name + ".data")
        made: list[TensorProto] = []
        ready: dict[str, Stored] = {}
        with data.open("wb") as file:
            for weight, tensor in self.weights.items():
                new = TensorProto(name=weight)
                source = self._sources.get(weight)
                if source is not None:
                    if weight not in ready:
                        ready |= dict(zip(source.names, source.make(), strict=True))
                    stored = ready.pop(weight)
                elif not self._is_outside(tensor):
                    made.append(tensor)
                    continue
                else:
                    stored = Stored(self.array(weight), tensor.data_type, tuple(tensor.dims))
                new.data_type = stored.data_type
                new.dims.extend(stored.dims)
                _write(file, new, stored.data)
                made.append(new)
                del stored
                done(weight)
                self._let_go()
            size = file.tell()
        if not size:
            data.unlink()
        del self.graph.initializer[:]
        self.graph.initializer.extend(made)
        path.write_bytes(self.model.SerializeToString())
        return path

    def copy_rest(self, folder: Path) -> None:
        """Copy what else is in the model's folder: tokenizer, settings."""
        if self.alone:
            return
        used = self.files
        for path in sorted(self.path.parent.rglob("*")):
            target = folder / path.relative_to(self.path.parent)
            if path.is_file() and path not in used and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, target)

    def _is_outside(self, tensor: TensorProto) -> bool:
        return bool(tensor.data_location) and tensor.name not in self._sources

    def _place(self, tensor: TensorProto) -> tuple[Path, int, int]:
        """File, offset and length in bytes of external data."""
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = told.get("location", "")
        root = self.path.parent.resolve()
        path = (root / location).resolve()
        if not location or Path(location).is_absolute() or root not in path.parents:
            raise UntrustedInput(
                f"{self.path.name}: {tensor.name} lies outside of the model's folder: {location!r}",
                fix="Keep the weights beside the graph.",
            )
        offset = int(told.get("offset") or 0)
        needed = _bytes(tensor)
        length = int(told.get("length") or needed)
        size = path.stat().st_size if path.is_file() else 0
        if length != needed or offset < 0 or offset + length > size:
            raise PassFailed(
                f"{path.name} is shorter than {self.path.name} says, or another file: {tensor.name} needs "
                f"{needed:,} bytes from {offset:,}, the file has {size:,}",
                fix=_AGAIN,
            )
        return path, offset, length

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]

    def _let_go(self) -> None:
        """Hand pages that were read back to the system; they are read again when asked for."""
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _load_inner(self) -> None:
        """Weights of subgraphs and functions into memory: they are small."""
        own = {id(one) for one in self.graph.initializer}
        for tensor in _tensors(self.graph):
            if id(tensor) not in own and tensor.data_location:
                path, offset, length = self._place(tensor)
                with path.open("rb") as file:
                    file.seek(offset)
                    tensor.raw_data = file.read(length)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")

    def _lift_constants(self) -> None:
        """Turn nodes that only give a tensor into initializers."""
        kept = []
        for node in self.graph.node:
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and value is not None:
                self.graph.initializer.add().CopyFrom(value)
                self.graph.initializer[-1].name = node.output[0]
            else:
                kept.append(node)
        if len(kept) < len(self.graph.node):
            kept = [_copy(node) for node in kept]
            del self.graph.node[:]
            self.graph.node.extend(kept)


def _copy(node: NodeProto) -> NodeProto:
    made = type(node)()
    made.CopyFrom(node)
    return made


def _frombuffer(data: Any, dtype: str) -> np.ndarray:
    import numpy as np

    return np.frombuffer(data, dtype)


def _packed(data_type: int) -> bool:
    """Whether several values share a byte."""
    return _bits(data_type) < 8


def _bits(data_type: int) -> int:
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    narrow = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    name = TensorProto.DataType.Name(data_type)
    return narrow.get(name) or 8 * int(tensor_dtype_to_np_dtype(data_type).itemsize)


def _bytes(tensor: TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return -(-count * _bits(tensor.data_type) // 8)


def _write(file: Any, tensor: TensorProto, data: np.ndarray) -> None:
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


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _inputs(graph: GraphProto) -> Iterator[str]:
    """Names that nodes read, in subgraphs too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _inputs(inner)
                yield from (output.name for output in inner.output)
