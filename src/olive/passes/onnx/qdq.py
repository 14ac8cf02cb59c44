"""MatMulNBits as standard ONNX: DequantizeLinear in blocks, and MatMul."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.errors import PassFailed
from olive.models.artifact import Artifact
from olive.passes.base import PassContext
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.graphs import Graph, Stored, open_graph
from olive.passes.onnx.nodes import attributes, label_of
from olive.passes.onnx.products import check_names, fresh
from olive.passes.onnx.weight_only import NodeParams
from olive.passes.onnx.weights import UINT8

if TYPE_CHECKING:
    from onnx import NodeProto

_OPSET, _IR = 21, 10  # DequantizeLinear in blocks, and integers of 4 bits
_TYPES = {(4, False): 21, (4, True): 22, (8, False): 2, (8, True): 3}  # UINT4, INT4, UINT8, INT8


@dataclass(frozen=True, slots=True)
class _Weight:
    """The parts of a MatMulNBits's weight and their form.

    Attributes:
        packed, scales, zeros: names of initializers; zeros may be empty.
        rows, columns: outputs and inputs.
        bits, block: of the grid.
        signed: whether the integers become signed.
    """

    packed: str
    scales: str
    zeros: str
    rows: int
    columns: int
    bits: int
    block: int
    signed: bool

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.columns // self.block)

    @property
    def data_type(self) -> int:
        """``TensorProto.DataType`` of the integers."""
        return _TYPES[self.bits, self.signed]

    @property
    def middle(self) -> int:
        """The zero point that MatMulNBits takes where none is given."""
        return 1 << (self.bits - 1)


class MatMulNBitsToQDQ(GraphPass["MatMulNBitsToQDQ.Params"]):
    """Products with integer weights as DequantizeLinear and MatMul, which every runtime of ONNX knows.

    Integers, scales and zero points keep their values.
    """

    libraries = ("onnx", "onnxruntime", "torch")

    class Params(NodeParams):
        """The form of the weights; names and defaults of Olive 0.13."""

        use_transpose_op: bool = Field(
            False, description="Keep weights as (outputs, inputs) and transpose behind DequantizeLinear."
        )
        use_int4: bool = Field(False, description="Signed integers where they have 4 bits.")
        use_signed_int: bool = Field(False, description="Signed integers.")
        add_zero_point: bool = Field(
            False, description="Write the zero points of signed integers even where all are 0."
        )
        nodes_to_exclude: tuple[str, ...] = Field((), description="Names of nodes that stay MatMulNBits.")

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Rewrite the graph of ``model`` into ``ctx.out``.

        Raises:
            PassFailed: no MatMulNBits that has such a form, an unknown node, or operators that ONNX cannot
                convert to opset 21.
        """
        graph = open_graph(model)
        check_names(graph, {"nodes_to_exclude": params.nodes_to_exclude})
        graph.raise_opset(_OPSET)
        graph.model.ir_version = max(graph.model.ir_version, _IR)
        made: dict[int, list[NodeProto]] = {}
        left: dict[str, str] = {}
        outputs: dict[_Weight, str] = {}
        for place, node in enumerate(graph.graph.node):
            if node.op_type != "MatMulNBits":
                continue
            if node.name in params.nodes_to_exclude:
                left[label_of(node)] = "in nodes_to_exclude"
            elif (reason := _reason(graph, node)) is not None:
                left[label_of(node)] = reason
            else:
                weight = _weight(node, params)
                before = [] if weight in outputs else _dequantise(graph, node, weight, params, outputs)
                made[place] = [*before, *_product(node, outputs[weight])]
        if not made:
            reasons = "".join(f"; {label}: {reason}" for label, reason in list(left.items())[:3])
            raise PassFailed(
                f"{graph.path.name} has no MatMulNBits to rewrite{reasons}",
                fix="Put a pass that makes integers before this one.",
            )
        graph.replace(made)
        size = self.write(graph, ctx, "rewrite")
        ctx.attributes["precision"] = f"int{min(weight.bits for weight in outputs)}"
        ctx.facts |= {
            "method": type(self).__name__,
            "products": len(made),
            "left": [{"name": label, "reason": reason} for label, reason in left.items()],
            "bytes": size,
        }
        for label, reason in left.items():
            if reason != "in nodes_to_exclude":
                ctx.progress.note(f"{label} stays MatMulNBits: {reason}")


def _input(node: NodeProto, place: int) -> str:
    return str(node.input[place]) if place < len(node.input) else ""


def _reason(graph: Graph, node: NodeProto) -> str | None:
    """Why a MatMulNBits has no such form."""
    import numpy as np

    told = attributes(node)
    if told["bits"] not in (4, 8):
        return f"DequantizeLinear of opset {_OPSET} has no {told['bits']} bits"
    if told.get("weight_prepacked", 0):
        return "its weight has the layout of one provider"
    if any(name and name not in graph.weights for name in list(node.input)[1:4]):
        return "its weight is no initializer"
    zeros = _input(node, 3)
    if zeros and graph.weights[zeros].data_type != UINT8:
        return "its zero points are real numbers"
    order = _input(node, 4)
    if order:
        if order not in graph.weights:
            return "its order of groups is no initializer"
        if not np.array_equal(graph.read(order), np.arange(told["K"]) // told["block_size"]):
            return "its groups are not in order"
    return None


def _weight(node: NodeProto, params: MatMulNBitsToQDQ.Params) -> _Weight:
    told = attributes(node)
    bits = told["bits"]
    return _Weight(
        packed=node.input[1],
        scales=node.input[2],
        zeros=_input(node, 3),
        rows=told["N"],
        columns=told["K"],
        bits=bits,
        block=told["block_size"],
        signed=params.use_signed_int or (params.use_int4 and bits == 4),
    )


def _dequantise(
    graph: Graph,
    node: NodeProto,
    weight: _Weight,
    params: MatMulNBitsToQDQ.Params,
    outputs: dict[_Weight, str],
) -> list[NodeProto]:
    """The nodes that give a weight in floating point; its parts go into the graph."""
    from onnx.helper import make_node

    across = params.use_transpose_op
    suffix = f"_Q{weight.bits}"
    base = weight.packed.removesuffix(suffix)
    wanted = [f"{base}_DQ{suffix}", f"{base}_DQ_scales"]
    with_zeros = params.add_zero_point or not weight.signed
    if weight.zeros and not with_zeros:
        with_zeros = bool((_points(graph, weight) != weight.middle).any())
    if with_zeros:
        wanted.append(f"{base}_DQ_zero_points")
    names: list[str] = []
    for name in wanted:
        names.append(fresh([*graph.weights, *names], name))
        data = _integers if name == wanted[0] else _scales if name == wanted[1] else _zeros
        graph.put((names[-1],), partial(data, graph, weight, across))
    whole = weight.blocks == 1
    axis = int(across) ^ int(whole)
    form: dict[str, Any] = {"axis": axis} if whole else {"axis": axis, "block_size": weight.block}
    output = f"{names[0]}_output"
    name = node.name.removesuffix(suffix)
    made = [make_node("DequantizeLinear", names, [output], f"{name}_DQ{suffix}" if name else "", **form)]
    if across:
        made.append(
            make_node(
                "Transpose",
                [output],
                [f"{output}_transposed"],
                f"{name}_transpose{suffix}" if name else "",
                perm=[1, 0],
            )
        )
        output = f"{output}_transposed"
    outputs[weight] = output
    return made


def _product(node: NodeProto, weight: str) -> list[NodeProto]:
    from onnx.helper import make_node

    suffix = f"_Q{attributes(node)['bits']}"
    name = node.name.removesuffix(suffix)
    bias = _input(node, 5)
    output = f"{node.output[0]}_product" if bias else node.output[0]
    made = [make_node("MatMul", [node.input[0], weight], [output], f"{name}_matmul{suffix}" if name else "")]
    if bias:
        made.append(make_node("Add", [output, bias], list(node.output), f"{name}_Add" if name else ""))
    return made


def _integers(graph: Graph, weight: _Weight, across: bool) -> tuple[Stored, ...]:
    import torch

    from olive.quantization.packing import unpack

    packed = torch.from_numpy(graph.read(weight.packed).reshape(weight.rows, -1).copy())
    codes = unpack(packed, weight.bits, weight.columns)
    if weight.signed:
        codes ^= weight.middle  # less the middle, in two's complement
    return (_stored(codes if across else codes.T.contiguous(), weight),)


def _scales(graph: Graph, weight: _Weight, across: bool) -> tuple[Stored, ...]:
    array = graph.read(weight.scales)
    if weight.blocks == 1:
        array = array.reshape(weight.rows)
    else:
        array = array.reshape(weight.rows, -1)
        array = array if across else array.T
    return (Stored(array, graph.data_type(weight.scales), array.shape),)


def _zeros(graph: Graph, weight: _Weight, across: bool) -> tuple[Stored, ...]:
    points = _points(graph, weight)
    if weight.signed:
        points ^= weight.middle
    if weight.blocks == 1:
        points = points.reshape(-1)
    elif not across:
        points = points.T.contiguous()
    return (_stored(points, weight),)


def _points(graph: Graph, weight: _Weight) -> Any:
    """Zero points as codes, uint8 (rows, blocks)."""
    import torch

    from olive.quantization.packing import unpack

    if not weight.zeros:
        return torch.full((weight.rows, weight.blocks), weight.middle, dtype=torch.uint8)
    packed = torch.from_numpy(graph.read(weight.zeros).reshape(weight.rows, -1).copy())
    return unpack(packed, weight.bits, weight.blocks)


def _stored(codes: Any, weight: _Weight) -> Stored:
    """Codes as a tensor of ONNX, which packs them over the ends of rows."""
    from olive.quantization.packing import pack

    return Stored(pack(codes.reshape(-1), weight.bits).numpy(), weight.data_type, tuple(codes.shape))
