"""Put quantised operators into the builder's graph, whose weights are rounded when the graph is written.

Nodes, names and attributes are those that the builder makes through onnxruntime's quantiser, which first
turns the whole model into one protobuf. Imported only where torch and onnx-ir already are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from olive.passes.export.rounding import Packed, Rounding
from olive.passes.export.weights import Release, Rows, Weight, rows_of

_Make = Callable[[], "dict[str, torch.Tensor]"]
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_GATHERED = 1 << 22  # weights of an embedding that are rounded at once


class Target(NamedTuple):
    """An operator to quantise.

    Attributes:
        node: MatMul or Gather.
        weight: its constant input.
        name: of that input.
        tensor: its content.
        shape: (inputs, outputs) of a MatMul, (rows, columns) of a Gather.
    """

    node: ir.Node
    weight: ir.Value
    name: str
    tensor: ir.TensorProtocol
    shape: tuple[int, ...]


def unfit(model: Any) -> str | None:
    """Why this graph is left to the builder's quantiser; None where it is not.

    Args:
        model: the builder's model, its graph complete.
    """
    return _options_unfit(model) or _weights_unfit(model)


def _options_unfit(model: Any) -> str | None:
    attributes, method, bits = model.quant_attrs, model.quantization_algo, _bits(model)
    packed = model.ep == "cuda" and model.matmul_attrs["weights_prepacked"] > 0
    reasons = {
        "use_qdq": attributes["use_qdq"],
        "overrides by node name": model.exact_quant_overrides,
        "weights packed for CUDA's kernels": packed and attributes["is_symmetric"],
        f"algo_config {method}": method not in ("default", "rtn", "k_quant"),
        "blocks of less than 16": attributes["matmul_block_size"] < 16,
        "bits other than 4 and 8": not {attributes["bits"], *bits.values()} <= {4, 8},
        # the builder's quantiser gives all of them the bits of the first
        "groups of layers of different bits": method == "default" and len(set(bits.values())) > 1,
    }
    return next((reason for reason, found in reasons.items() if found), None)


def _weights_unfit(model: Any) -> str | None:
    method, graph = model.quantization_algo, model.model.graph
    own = set(graph)
    if method == "default" and any(_constant(node) for node in graph.all_nodes() if node not in own):
        return "weights in a graph inside the graph"
    for node, _, name, tensor, shape in _targets(model):
        if len(shape) != 2 or tensor.dtype not in _FLOATS:
            return f"{name}, {tensor.dtype} of {len(shape)} dimensions"
        if tensor.dtype == ir.DataType.BFLOAT16 and (method != "default" or node.op_type == "Gather"):
            return "bfloat16"
        if method == "default" and shape[node.op_type == "Gather"] % 2:
            return f"{name} with an odd number of inputs"
    return None


def quantise(model: Any, release: Release, ahead: Ahead) -> None:
    """Replace the operators that the builder would have quantised; nothing is read yet.

    Args:
        model: the builder's model, which ``unfit`` found nothing against.
        release: lets go of the pages of a tensor that has been read.
        ahead: where matrices are rounded.
    """
    bits = _bits(model)
    attributes = model.quant_attrs
    for target in list(_targets(model)):
        if target.node.op_type == "Gather":
            if attributes["bits"] == 4:
                _gather(model, target, release, ahead)
            continue
        how = Rounding(
            model.quantization_algo,
            bits.get(str(target.node.name), attributes["bits"]),
            attributes["matmul_block_size"],
            attributes["is_symmetric"],
            to_torch_dtype(target.tensor.dtype),
        )
        _matmul(model, target, how, release, ahead)
    if model.quantization_algo == "default":
        for name, value in list(model.model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.model.graph.initializers[name]


def _bits(model: Any) -> dict[str, int]:
    return {name: config["bits"] for name, config in model.int4_customized_weight_config.items()}


def _constant(node: ir.Node) -> ir.Value | None:
    """The weight of a node that may be quantised, where it is an initializer."""
    place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    if place is None or node.domain not in ("", "ai.onnx") or len(node.inputs) <= place:
        return None
    value = node.inputs[place]
    return value if value is not None and value.is_initializer() else None


def _targets(model: Any) -> Iterator[Target]:
    """``rtn`` and ``k_quant`` know MatMul alone, whatever is asked."""
    default = model.quantization_algo == "default"
    excluded = set(model.quant_attrs["nodes_to_exclude"])
    named = model.int4_customized_weight_config if default else {}
    kinds = model.quant_attrs["op_types_to_quantize"] if default else ("MatMul",)
    for node in model.model.graph:
        value = _constant(node)
        if value is None or value.const_value is None or node.name in excluded:
            continue
        if node.op_type in kinds or node.name in named:
            shape = tuple(value.const_value.shape.numpy())
            yield Target(node, value, str(value.name), value.const_value, shape)


class Ahead:
    """Rounds a matrix while the one before it is written.

    Args:
        pool: of one thread; rounding itself takes as many as there are.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._makes: list[_Make] = []
        self._begun: dict[int, Future[dict[str, torch.Tensor]]] = {}

    def add(self, make: _Make) -> int:
        """Another matrix, in the order of writing."""
        self._makes.append(make)
        return len(self._makes) - 1

    def get(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a matrix; the next one is begun."""
        begun = self._begun.pop(number, None)
        made = self._makes[number]() if begun is None else begun.result()
        if number + 1 < len(self._makes) and number + 1 not in self._begun:
            self._begun[number + 1] = self._pool.submit(self._makes[number + 1])
        return made


class _Matrix:
    """One matrix, rounded once for its three tensors, which are written one after the other."""

    def __init__(self, ahead: Ahead, make: _Make) -> None:
        self._ahead, self._number = ahead, ahead.add(make)
        self._made: dict[str, torch.Tensor] = {}

    def take(self, part: str) -> torch.Tensor:
        """One of the tensors; kept until it is taken."""
        if part not in self._made:
            self._made = self._ahead.get(self._number)
        return self._made.pop(part)


def _lazy(matrix: _Matrix, part: str, dtype: ir.DataType, shape: tuple[int, ...], name: str) -> ir.LazyTensor:
    def made() -> ir.TensorProtocol:
        value = matrix.take(part)
        if dtype in (ir.DataType.INT4, ir.DataType.UINT4):
            return ir.PackedTensor(value.numpy(), dtype, shape=ir.Shape(shape), name=name)
        return TorchTensor(value, name=name)

    return ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(shape), name=name)


def _initializer(model: Any, tensor: ir.LazyTensor) -> ir.Value:
    value: ir.Value = model.make_value(tensor.name, tensor.dtype, tensor.shape)
    value.const_value = tensor
    model.model.graph.register_initializer(value)
    return value


def _matmul(model: Any, target: Target, how: Rounding, release: Release, ahead: Ahead) -> None:
    node, _, old, tensor, (columns, count) = target
    rows = rows_of(tensor)

    def made() -> dict[str, torch.Tensor]:
        packed: Packed = how.matrix(rows, release)
        return {name: value for name, value in packed._asdict().items() if value is not None}

    matrix, shapes = _Matrix(ahead, made), how.shapes(count, columns)
    names = (
        (f"{old}_Q{how.bits}", f"{old}_scales", f"{old}_zero_points")
        if how.method == "default"
        else (f"{old}_Q{how.bits}G{how.block}", f"{old}_scale", f"{old}_zp")
    )
    dtypes = ir.DataType.UINT8, tensor.dtype, ir.DataType.UINT8
    parts = [
        _initializer(model, _lazy(matrix, part, dtype, shape, name))
        for part, dtype, shape, name in zip(Packed._fields, dtypes, shapes, names, strict=True)
        if part != "zeros" or how.zeros
    ]
    attributes = {"K": columns, "N": count, "bits": how.bits, "block_size": how.block}
    if level := model.quant_attrs["accuracy_level"]:
        attributes["accuracy_level"] = level
    _replace(model, node, "MatMulNBits", f"{node.name}_Q{how.bits}", [node.inputs[0], *parts], attributes)
    _forget(model, target.weight)


def _gather(model: Any, target: Target, release: Release, ahead: Ahead) -> None:
    """An embedding of its own, whose codes of 4 bits are stored as such."""
    node, _, old, tensor, (count, columns) = target
    rows = (
        tensor.rows
        if isinstance(tensor, Weight) and not tensor.transposed
        else Rows([torch.from_numpy(tensor.numpy())])
    )
    block, symmetric = model.quant_attrs["matmul_block_size"], model.quant_attrs["is_symmetric"]
    blocks = -(-columns // block)
    cast = to_torch_dtype(tensor.dtype)

    def made() -> dict[str, torch.Tensor]:
        return _rows_in_4_bits(rows, block, cast, release, symmetric=symmetric)

    matrix = _Matrix(ahead, made)
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    parts = [
        _initializer(model, _lazy(matrix, "weight", kind, (count, columns), f"{old}_Q4")),
        _initializer(model, _lazy(matrix, "scales", tensor.dtype, (count, blocks), f"{old}_scales")),
    ]
    if not symmetric:
        name = f"{old}_zero_points"
        parts.append(_initializer(model, _lazy(matrix, "zeros", kind, (count, blocks), name)))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    attributes = {"gather_axis": axis, "quantize_axis": 1, "block_size": block}
    inputs = [parts[0], node.inputs[1], *parts[1:]]
    _replace(model, node, "GatherBlockQuantized", f"{node.name}_Q4", inputs, attributes)
    _forget(model, target.weight)


def _rows_in_4_bits(
    rows: Rows, block: int, cast: torch.dtype, release: Release, *, symmetric: bool
) -> dict[str, torch.Tensor]:
    """By onnxruntime's own function, on an even number of rows at a time: pairs of codes share a byte."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

    found: dict[str, list[torch.Tensor]] = {"weight": [], "scales": [], "zeros": []}
    step = max(2, _GATHERED // rows.shape[1] // 2 * 2)
    for piece in rows.whole().split(step):
        parts = DefaultWeightOnlyQuantizer.quantize_ndarray(piece.to(cast).numpy(), 1, block, symmetric)
        for name, part in zip(found, parts, strict=True):
            if part is not None:
                found[name].append(torch.from_numpy(part))
        release(piece)
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _replace(
    model: Any,
    node: ir.Node,
    kind: str,
    name: str,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, int],
) -> None:
    node.op_type, node.domain, node.name = kind, "com.microsoft", name
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
    node.attributes.clear()
    for key, number in sorted(attributes.items()):
        node.attributes.add(ir.AttrInt64(key, number))


def _forget(model: Any, old: ir.Value) -> None:
    """Leave out a weight that no node reads any more."""
    if not old.uses():
        del model.model.graph.initializers[str(old.name)]
