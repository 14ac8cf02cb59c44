"""What the graphs inside of nodes read and give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_FLOAT = 1  # TensorProto.DataType


def type_by_attribute(node: NodeProto, place: int) -> int | None:
    """Type of an output where an attribute decides it."""
    given = {one.name: one for one in node.attribute}
    if node.op_type == "Cast":
        return given["to"].i if "to" in given else None
    if node.op_type == "If" and "then_branch" in given:
        return _element(given["then_branch"].g.output[place])
    if node.op_type in ("Loop", "Scan") and "body" in given:
        skipped = 1 if node.op_type == "Loop" else 0  # the condition
        return _element(given["body"].g.output[place + skipped])
    if node.op_type == "ConstantOfShape":
        return int(given["value"].t.data_type) if "value" in given else _FLOAT
    if node.op_type == "Constant":
        return _FLOAT if given.keys() & {"value_float", "value_floats"} else None
    if node.op_type in ("RandomNormal", "RandomUniform", "EyeLike", "Bernoulli", "Multinomial"):
        return int(given["dtype"].i) if "dtype" in given else _FLOAT if "Random" in node.op_type else None
    return None


def _element(value: Any) -> int | None:
    return int(value.type.tensor_type.elem_type) or None


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def captured(node: NodeProto) -> Iterator[str]:
    """Names from outside that the subgraphs of a node read."""
    for graph in _graphs(node):
        own = {one.name for one in (*graph.input, *graph.initializer)}
        own |= {name for inner in graph.node for name in inner.output}
        read = [name for inner in graph.node for name in inner.input]
        read += [name for inner in graph.node for name in captured(inner)]
        read += [one.name for one in graph.output]
        yield from (name for name in read if name and name not in own)


def rename(node: NodeProto, old: str, new: str) -> None:
    """Let the subgraphs of a node read another value from outside."""
    for graph in _graphs(node):
        own = {one.name for one in (*graph.input, *graph.initializer)}
        own |= {name for inner in graph.node for name in inner.output}
        if old in own:
            continue
        for inner in graph.node:
            for place, name in enumerate(inner.input):
                if name == old:
                    inner.input[place] = new
            rename(inner, old, new)
        for one in graph.output:
            if one.name == old:
                one.name = new
