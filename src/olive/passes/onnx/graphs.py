"""An ONNX model whose weights stay on disk while its graph is changed, and are streamed when it is written.

The graph is read without external data; an initializer is a view of its mapped file. What a pass puts in its
place is made when the new file of weights is written, so that about one matrix is in memory at a time.
Format: onnx.proto3 of ONNX, section External Data.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from olive.errors import ConfigError, PassFailed, UntrustedInput
from olive.models.artifact import Artifact
from olive.passes.onnx.nodes import STANDARD, copy_of, inner_tensors, inputs_of
from olive.passes.onnx.stored import Stored, byte_count, from_buffer, shares_bytes, write_tensor
from olive.store.copying import copy_file

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

__all__ = ["Graph", "Stored", "graph_file", "open_graph"]

_AGAIN = "Copy or export the model again."


@dataclass(slots=True)
class _Source:
    """How some weights are made: names, and the function that makes all of them, in that order."""

    names: tuple[str, ...]
    make: Callable[[], tuple[Stored, ...]]


def graph_file(folder: Path) -> Path:
    """The graph of a model folder: of a bundle its decoder, else the only ``*.onnx``.

    Raises:
        ConfigError: none, or several, or a bundle that does not say.
        UntrustedInput: a bundle whose graph is not beside its settings.
    """
    bundle = folder / "genai_config.json"
    if bundle.is_file():
        try:
            name = str(json.loads(bundle.read_text(encoding="utf-8"))["model"]["decoder"]["filename"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{bundle} names no decoder: {error!r}", fix=_AGAIN) from error
        if Path(name).name != name:
            raise UntrustedInput(
                f"{bundle} names a graph in another folder: {name!r}", fix="Keep the graph beside it."
            )
        return folder / name
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
        files: the graph's file and the files of its external data, as it was read.

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
        self._lift_constants()
        self._load_inner()
        self.weights: dict[str, TensorProto] = {one.name: one for one in self.graph.initializer}
        self._as_read = dict(self.weights)
        self.files: frozenset[Path] = frozenset(
            {path, *(self._place(one)[0] for one in self.weights.values() if self._is_outside(one))}
        )

    @property
    def graph(self) -> GraphProto:
        """The main graph."""
        return self.model.graph

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return max((one.version for one in self.model.opset_import if one.domain in STANDARD), default=1)

    def need_opset(self, domain: str, version: int) -> None:
        """Declare a domain of operators, or raise its version; of the standard ones call the converter."""
        for one in self.model.opset_import:
            if one.domain == domain:
                one.version = max(one.version, version)
                return
        self.model.opset_import.add(domain=domain, version=version)

    def array(self, name: str) -> np.ndarray:
        """A weight as it is now; read-only, a view of its file where it has one. 4-bit types: their bytes."""
        source = self._sources.get(name)
        if source is not None:
            return source.make()[source.names.index(name)].data
        return self.read(name)

    def read(self, name: str) -> np.ndarray:
        """A weight as it was read, whatever was put in its place or dropped since; as ``array``."""
        from onnx import numpy_helper
        from onnx.helper import tensor_dtype_to_np_dtype

        tensor = self._as_read[name]
        if not tensor.data_location:
            if shares_bytes(tensor.data_type):
                return from_buffer(tensor.raw_data or bytes(one & 255 for one in tensor.int32_data), "uint8")
            return numpy_helper.to_array(tensor)
        path, offset, length = self._place(tensor)
        mapped = self._map(path) if length else b""
        raw = from_buffer(memoryview(mapped)[offset : offset + length], "uint8")
        if shares_bytes(tensor.data_type):
            return raw
        return raw.view(tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tuple(tensor.dims))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight of the model as it was read."""
        return tuple(self._as_read[name].dims)

    def data_type(self, name: str) -> int:
        """``TensorProto.DataType`` of a weight of the model as it was read."""
        return int(self._as_read[name].data_type)

    def put(self, names: tuple[str, ...], make: Callable[[], tuple[Stored, ...]]) -> None:
        """Add weights, or put others in the place of those of these names.

        Args:
            names: of the initializers.
            make: gives them, in this order; called once when the model is written. What it makes them of it
                takes from ``read``.
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

    def raise_opset(self, version: int) -> None:
        """Convert the standard operators to those of ``version``; call it before ``put``.

        Raises:
            PassFailed: ONNX cannot convert one of them.
        """
        from onnx.version_converter import ConvertError, convert_version

        if self.opset >= version:
            return
        try:
            self.model = convert_version(self.model, version)
        except (ConvertError, RuntimeError) as error:
            raise PassFailed(
                f"{self.path.name} has operators of version {self.opset} that ONNX does not convert to those "
                f"of {version}: {error}",
                fix=f"Export the model again with an opset of {version}.",
            ) from error
        self._lift_constants()
        self.weights = {one.name: one for one in self.graph.initializer}
        self._as_read = dict(self.weights)

    def drop_unused(self) -> None:
        """Forget nodes and weights that nothing reads; what older models list among the inputs, there too."""
        read = {output.name for output in self.graph.output}
        unread: dict[int, tuple[NodeProto, ...]] = {}
        for place, node in reversed(list(enumerate(self.graph.node))):
            if read.isdisjoint(node.output):
                unread[place] = ()
            else:
                read.update(inputs_of(node))
        if unread:
            self.replace(unread)
        for name in [name for name in self.weights if name not in read]:
            del self.weights[name]
            self._sources.pop(name, None)
            for place in reversed(range(len(self.graph.input))):
                if self.graph.input[place].name == name:
                    del self.graph.input[place]

    def replace(self, made: Mapping[int, Sequence[NodeProto]]) -> None:
        """Put other nodes in the place of some.

        Args:
            made: position of a node of the main graph -> what stands there then; may be empty.
        """
        nodes = [
            copy_of(node) for place, old in enumerate(self.graph.node) for node in made.get(place, (old,))
        ]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

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
            OSError: the disk is full.
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
                write_tensor(file, new, stored.data)
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
        """Copy what else is in the model's folder: tokenizer, settings; no hidden files, ours among them."""
        if self.alone:
            return
        used = self.files
        for path in sorted(self.path.parent.rglob("*")):
            inner = path.relative_to(self.path.parent)
            target = folder / inner
            hidden = any(part.startswith(".") for part in inner.parts)
            if not hidden and path.is_file() and path not in used and not target.exists():
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
                f"{self.path.name}: the weight {tensor.name} lies outside of the model's folder: "
                f"{location!r}",
                fix="Keep the weights beside the graph.",
            )
        needed = byte_count(tensor)
        try:
            offset, length = int(told.get("offset") or 0), int(told.get("length") or needed)
        except ValueError as error:
            raise ConfigError(f"{self.path}: no place of {tensor.name}: {error}", fix=_AGAIN) from error
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
        for tensor in (one for part in (self.graph, *self.model.functions) for one in inner_tensors(part)):
            if tensor.data_location:
                path, offset, length = self._place(tensor)
                with path.open("rb") as file:
                    file.seek(offset)
                    tensor.raw_data = file.read(length)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")

    def _lift_constants(self) -> None:
        """Turn nodes that only give a tensor into initializers."""
        lifted: dict[int, tuple[NodeProto, ...]] = {}
        for place, node in enumerate(self.graph.node):
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if node.op_type == "Constant" and node.domain in STANDARD and value is not None:
                self.graph.initializer.add().CopyFrom(value)
                self.graph.initializer[-1].name = node.output[0]
                lifted[place] = ()
        if lifted:
            self.replace(lifted)
