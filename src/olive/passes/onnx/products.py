"""Which nodes of a graph take a weight that can be quantised, and which are left, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from olive.config.suggest import did_you_mean
from olive.errors import PassFailed, Problem, Severity
from olive.passes.onnx.nodes import STANDARD, attributes, label_of

if TYPE_CHECKING:
    from onnx import NodeProto

    from olive.passes.onnx.graphs import Graph

_ROUTER = re.compile(r"(^|[./])(router|gate|shared_expert_gate)([./]|$)", re.IGNORECASE)
_EXPERTS = frozenset({"MoE", "QMoE"})
_PROBABILITIES, _WEIGHTS = 1, 14  # inputs of theirs that come from the router
_BETWEEN = frozenset(
    {
        *(
            "Add",
            "Cast",
            "Clip",
            "Div",
            "Exp",
            "Flatten",
            "Gather",
            "GatherElements",
            "Identity",
            "LogSoftmax",
        ),
        *("Mul", "ReduceMax", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Softplus"),
        *("Split", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where"),
    }
)
_FLOATS = (1, 10, 16)  # FLOAT, FLOAT16, BFLOAT16


@dataclass(frozen=True, slots=True)
class Product:
    """A node that multiplies by a weight, or looks a row of it up.

    Attributes:
        place: position of the node in the graph.
        label: its name; of a node without one, that of its output.
        kind: ``MatMul``, ``Gemm`` or ``Gather``.
        weight: name of the initializer, which a Transpose may turn.
        stored: whether the weight is stored as (outputs, inputs), as integers are.
        rows, columns: outputs and inputs; of a table its rows and their width.
        data_type: ``TensorProto.DataType`` of the weight.
    """

    place: int
    label: str
    kind: str
    weight: str
    stored: bool
    rows: int
    columns: int
    data_type: int


@dataclass(slots=True)
class Found:
    """Products to quantise, in the graph's order, and label -> reason of those that stay as they are."""

    products: list[Product] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find(
    graph: Graph,
    kinds: Sequence[str],
    nodes_to_exclude: Iterable[str] = (),
    nodes_to_include: Iterable[str] = (),
    **others: Iterable[str],
) -> Found:
    """Nodes of the main graph whose weight is a matrix of floating point among the initializers.

    Args:
        graph: of the model.
        kinds: operators that are looked for.
        nodes_to_exclude: names of nodes that stay as they are.
        nodes_to_include: names of the only nodes to take; all where empty.
        others: further parameters that name nodes.

    Raises:
        PassFailed: an unknown name, or no node is left.
    """
    excluded, included = frozenset(nodes_to_exclude), frozenset(nodes_to_include)
    check_names(graph, {"nodes_to_exclude": excluded, "nodes_to_include": included, **others})
    makers = {output: node for node in graph.graph.node for output in node.output}
    routers = _routers(graph)
    found = Found()
    for place, node in enumerate(graph.graph.node):
        product = _product(graph, place, node, kinds, makers)
        if product is None or (included and node.name not in included):
            continue
        if node.name in excluded:
            found.left[product.label] = "in nodes_to_exclude"
        elif product.kind != "Gather" and (place in routers or _ROUTER.search(node.name)):
            found.left[product.label] = "chooses experts: an error there sends tokens elsewhere"
        else:
            found.products.append(product)
    missed = included - {one.label for one in found.products} - found.left.keys()
    if missed:
        raise PassFailed(
            f"{min(missed)!r} is no {' or '.join(kinds)} with a matrix of floating point as its weight",
            where="nodes_to_include",
            fix="Take it off the list.",
        )
    return found


def check_names(graph: Graph, named: Mapping[str, Iterable[str]]) -> None:
    """See that the nodes a parameter names are there.

    Args:
        graph: of the model.
        named: parameter -> names of nodes.

    Raises:
        PassFailed: one is not; the message says which was probably meant.
    """
    for problem in unknown([node.name for node in graph.graph.node], graph.path.name, named):
        raise PassFailed(problem.message, where=problem.where, fix=problem.fix)


def unknown(nodes: Iterable[str], file: str, named: Mapping[str, Iterable[str]]) -> Iterator[Problem]:
    """Names that no node has; a warning each, since an earlier pass may make the node.

    Args:
        nodes: names of the nodes that are there.
        file: of the graph.
        named: parameter -> names of nodes.
    """
    known = [name for name in nodes if name]
    for parameter, names in named.items():
        for name in sorted(set(names) - set(known)):
            near = [one for one in known if len(known) < 20 or _near(one, name)]
            yield Problem(
                f"{file} has no node {name!r}",
                where=parameter,
                fix=did_you_mean(name, near or known[:5]),
                severity=Severity.WARNING,
            )


def fresh(taken: Iterable[str], *wanted: str) -> str:
    """The first of the names that is not taken; the last one numbered where all are."""
    names = set(taken)
    for name in wanted:
        if name not in names:
            return name
    number = 2
    while f"{wanted[-1]}_{number}" in names:
        number += 1
    return f"{wanted[-1]}_{number}"


def _near(known: str, name: str) -> bool:
    """Cheap test of likeness: graphs have thousands of nodes."""
    return abs(len(known) - len(name)) < 4 and len(set(known) ^ set(name)) < 6


def _product(
    graph: Graph, place: int, node: NodeProto, kinds: Sequence[str], makers: Mapping[str, NodeProto]
) -> Product | None:
    if node.op_type not in kinds or node.domain not in STANDARD:
        return None
    weight = node.input[0 if node.op_type == "Gather" else 1]
    maker = makers.get(weight)
    turned = maker is not None and maker.op_type == "Transpose" and maker.domain in STANDARD
    if maker is not None and turned:
        if list(attributes(maker).get("perm", (1, 0))) != [1, 0]:
            return None
        weight = maker.input[0]
    tensor = graph.weights.get(weight)
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in _FLOATS or 0 in tensor.dims:
        return None
    stored = node.op_type == "Gather"
    if node.op_type != "MatMul":
        settings = attributes(node)
        if settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0:
            return None
        if settings.get("transA", 0) or settings.get("axis", 0):
            return None
        stored = stored or bool(settings.get("transB", 0))
    stored ^= turned
    rows, columns = tensor.dims if stored else reversed(tensor.dims)
    return Product(
        place, label_of(node), node.op_type, weight, stored, int(rows), int(columns), tensor.data_type
    )


def _routers(graph: Graph) -> frozenset[int]:
    """Positions of the products whose outputs choose experts."""
    makers = {output: place for place, node in enumerate(graph.graph.node) for output in node.output}
    ahead = [
        node.input[place]
        for node in graph.graph.node
        if node.op_type in _EXPERTS
        for place in (_PROBABILITIES, _WEIGHTS)
        if place < len(node.input)
    ]
    found: set[int] = set()
    seen: set[str] = set()
    while ahead:
        name = ahead.pop()
        if name in seen or name not in makers:
            continue
        seen.add(name)
        node = graph.graph.node[makers[name]]
        if node.op_type in ("MatMul", "Gemm"):
            found.add(makers[name])
        elif node.op_type in _BETWEEN:
            ahead += node.input
    return frozenset(found)
