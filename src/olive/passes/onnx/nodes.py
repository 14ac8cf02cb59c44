"""Nodes of a graph: what they say, read and hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, NodeProto, TensorProto

STANDARD = ("", "ai.onnx")  # domain of the standard operators


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node by name."""
    from onnx.helper import get_attribute_value

    return {one.name: get_attribute_value(one) for one in node.attribute}


def label_of(node: NodeProto) -> str:
    """The name of a node; where it has none, of its first output."""
    return str(node.name or node.output[0])


def copy_of(node: NodeProto) -> NodeProto:
    """A node of its own."""
    made = type(node)()
    made.CopyFrom(node)
    return made


def inner_tensors(part: GraphProto | FunctionProto) -> Iterator[TensorProto]:
    """Tensors in attributes, and the initializers of subgraphs, at any depth."""
    for node in part.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from inner.initializer
                yield from inner_tensors(inner)


def inputs_of(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, in its subgraphs too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            for each in inner.node:
                yield from inputs_of(each)
            yield from (output.name for output in inner.output)
