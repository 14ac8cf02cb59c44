"""Put quantised operators into the builder's graph, whose weights are rounded when the graph is written.

Nodes, names and attributes are those that the builder makes through onnxruntime's quantiser, which first
turns the whole model into one protobuf. Imported only where torch and onnx-ir already are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from olive.passes.export.rounding import Packed, Rounding
from olive.passes.export.weights import Release, Rows, Weight, rows_of

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_GATHERED = 1 << 22  # weights of an embedding that are rounded at once


def unfit(model: Any) -> str | None:
    """Why this graph is left to the builder's quantiser; None where it is not.

    Args:
        model: the builder's model, its graph complete.
    """
    attributes = model.quant_attrs
    method = model.quantization_algo
    if attributes["use_qdq"]:
        return "use_qdq"
    if model.exact_quant_overrides:
        return "overrides by node name"
    if model.ep == "cuda" and model.matmul_attrs["weights_prepacked"] > 0 and attributes["is_symmetric"]:
        return "weights packed for CUDA's kernels"
    if method not in ("default", "rtn", "k_quant"):
        return f"algo_config {method}"
    if attributes["matmul_block_size"] < 16:
        return f"blocks of {attributes['matmul_block_size']}"
    bits = _bits(model)
    if not {attributes["bits"], *bits.values()} <= {4, 8}:
        return "bits other than 4 and 8"
    if method == "default" and len(set(bits.values())) > 1:
        return "several groups of layers with bits of their own"
    inner = {node.op_type for node in model.model.graph.all_nodes()} & {"If", "Loop", "Scan"}
    if inner and method == "default" and any(_constant(node) for node in _inner(model.model.graph)):
        return "weights in a graph inside the graph"
    for node, tensor in _targets(model):
        if len(tensor.shape) != 2 or tensor.dtype not in _FLOATS:
            return f"{node.name} multiplies {tensor.dtype} of {len(tensor.shape)} dimensions"
        if tensor.dtype == ir.DataType.BFLOAT16 and (method != "default" or node.op_type == "Gather"):
            return "bfloat16"
        if method == "default" and tensor.shape[node.op_type == "Gather"] % 2:
            return f"{node.name} has an odd number of inputs"
    return None


def quantise(model: Any, release: Release) -> None:
    """Replace the operators that the builder would have quantised; nothing is read yet.

    Args:
        model: the builder's model, which ``unfit`` found nothing against.
        release: lets go of the pages of a tensor that has been read.
    """
    bits = _bits(model)
    attributes = model.quant_attrs
    for node, tensor in list(_targets(model)):
        if node.op_type == "Gather":
            if attributes["bits"] == 4:
                _gather(model, node, tensor, release)
            continue
        how = Rounding(
            model.quantization_algo,
            bits.get(node.name, attributes["bits"]),
            attributes["matmul_block_size"],
            attributes["is_symmetric"],
            to_torch_dtype(tensor.dtype),
        )
        _matmul(model, node, tensor, how, release)
    if model.quantization_algo == "default":
        for name, value in list(model.model.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del model.model.graph.initializers[name]


def _bits(model: Any) -> dict[str, int]:
    return {name: config["bits"] for name, config in model.int4_customized_weight_config.items()}


def _inner(graph: ir.Graph) -> Iterator[ir.Node]:
    own = set(graph)
    yield from (node for node in graph.all_nodes() if node not in own)


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    """The weight of a node that may be quantised, where it is an initializer."""
    place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
    if place is None or node.domain not in ("", "ai.onnx") or len(node.inputs) <= place:
        return None
    value = node.inputs[place]
    return value.const_value if value is not None and value.is_initializer() else None


def _targets(model: Any) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """Nodes to quantise and their weights; ``rtn`` and ``k_quant`` know MatMul alone, whatever is asked."""
    excluded = set(model.quant_attrs["nodes_to_exclude"])
    named = model.int4_customized_weight_config if model.quantization_algo == "default" else {}
    kinds = model.quant_attrs["op_types_to_quantize"] if model.quantization_algo == "default" else ("MatMul",)
    for node in model.model.graph:
        tensor = _constant(node)
        if tensor is None or node.name in excluded:
            continue
        if node.op_type in kinds or node.name in named:
            yield node, tensor


class _Matrix:
    """One matrix, rounded once for its three tensors, which are written one after the other."""

    def __init__(self, make: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._make = make
        self._made: dict[str, torch.Tensor] = {}

    def take(self, part: str) -> torch.Tensor:
        """One of the tensors; kept until it is taken."""
        if part not in self._made:
            self._made = dict(self._make())
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


def _matmul(model: Any, node: ir.Node, tensor: ir.TensorProtocol, how: Rounding, release: Release) -> None:
    rows = rows_of(tensor)
    count, columns = rows.shape

    def made() -> dict[str, torch.Tensor]:
        packed: Packed = how.matrix(rows, release)
        return {name: value for name, value in packed._asdict().items() if value is not None}

    old = node.inputs[1]
    matrix, shapes = _Matrix(made), how.shapes(count, columns)
    names = (
        (f"{old.name}_Q{how.bits}", f"{old.name}_scales", f"{old.name}_zero_points")
        if how.method == "default"
        else (f"{old.name}_Q{how.bits}G{how.block}", f"{old.name}_scale", f"{old.name}_zp")
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
    _forget(model, old)


def _gather(model: Any, node: ir.Node, tensor: ir.TensorProtocol, release: Release) -> None:
    """An embedding of its own, whose codes of 4 bits are stored as such."""
    rows = (
        tensor.rows
        if isinstance(tensor, Weight) and not tensor.transposed
        else Rows([torch.from_numpy(tensor.numpy())])
    )
    block, symmetric = model.quant_attrs["matmul_block_size"], model.quant_attrs["is_symmetric"]
    count, columns = rows.shape
    old, blocks = node.inputs[0], -(-columns // block)
    cast = to_torch_dtype(tensor.dtype)

    def made() -> dict[str, torch.Tensor]:
        return _rows_in_4_bits(rows, block, cast, release, symmetric=symmetric)

    matrix = _Matrix(made)
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    parts = [
        _initializer(model, _lazy(matrix, "weight", kind, (count, columns), f"{old.name}_Q4")),
        _initializer(model, _lazy(matrix, "scales", tensor.dtype, (count, blocks), f"{old.name}_scales")),
    ]
    if not symmetric:
        name = f"{old.name}_zero_points"
        parts.append(_initializer(model, _lazy(matrix, "zeros", kind, (count, blocks), name)))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    attributes = {"gather_axis": axis, "quantize_axis": 1, "block_size": block}
    inputs = [parts[0], node.inputs[1], *parts[1:]]
    _replace(model, node, "GatherBlockQuantized", f"{node.name}_Q4", inputs, attributes)
    _forget(model, old)


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


def _forget(model: Any, old: ir.Value | None) -> None:
    """Leave out a weight that no node reads any more."""
    if old is not None and old.name is not None and not old.uses():
        del model.model.graph.initializers[old.name]
