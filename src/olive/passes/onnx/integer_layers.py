"""How far the integers of a graph's weights are from the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olive.passes.onnx.rounding import relative_error

if TYPE_CHECKING:
    import numpy as np

    from olive.passes.onnx.graphs import Graph


def table(before: Graph, after: Graph) -> list[dict[str, Any]]:
    """One row a quantised weight.

    Args:
        before: in floating point.
        after: as onnxruntime's quantiser names integers, scales and zero points.

    Returns:
        rows with ``name``, ``bits``, ``scales`` (how many), ``group_size`` (weights that share one; -1: those
        of an output) and ``weight_error``, the squared error over the sum of squares.
    """
    import numpy as np

    axes = {
        node.input[0]: attribute.i
        for node in after.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "axis"
    }
    rows = []
    for name, tensor in before.weights.items():
        integers, scale, zero = (f"{name}_{part}" for part in ("quantized", "scale", "zero_point"))
        if not {integers, scale} <= after.weights.keys() or tensor.data_type not in (1, 10):
            continue
        weight = before.array(name)
        codes, bits = _codes(after, integers, weight.size)
        scales = after.array(scale).astype(np.float64)
        zeros: np.ndarray = np.zeros(())
        if zero in after.weights:
            zeros = _codes(after, zero, scales.size)[0].astype(np.float64).reshape(scales.shape)
        axis = axes.get(integers, _axis(before, name, weight.shape, scales.size))
        if codes.size != weight.size or axis is None:
            continue
        shape = [1] * weight.ndim
        if scales.size > 1:
            shape[axis] = scales.size
        if scales.size > 1 and (weight.ndim < 1 or weight.shape[axis] != scales.size):
            continue  # blocks
        stands_for = (codes.reshape(weight.shape) - zeros.reshape(shape if zeros.size > 1 else ())) * (
            scales.reshape(shape) if scales.size > 1 else scales.reshape(())
        )
        error = relative_error(weight, stands_for)
        rows.append(
            {
                "name": name,
                "bits": bits,
                "group_size": -1 if scales.size > 1 else int(weight.size),
                "scales": int(scales.size),
                "weight_error": error,
            }
        )
    return rows


def _codes(graph: Graph, name: str, count: int) -> tuple[np.ndarray, int]:
    """Integers and their bits."""
    import numpy as np
    from onnx import TensorProto

    value, kind = graph.array(name), graph.weights[name].data_type
    if kind not in (TensorProto.INT4, TensorProto.UINT4):
        return value, 8 * value.dtype.itemsize
    if value.size == count:  # one byte each
        return value.astype(np.int8), 4
    both = np.stack([value & 15, value >> 4], -1).reshape(-1)[:count].astype(np.int8)
    return (np.where(both > 7, both - 16, both) if kind == TensorProto.INT4 else both), 4


def _axis(graph: Graph, name: str, shape: tuple[int, ...], scales: int) -> int | None:
    """Axis of the outputs of a weight."""
    if scales == 1 or not shape:
        return 0
    for node in graph.readers(name):
        if node.op_type in ("MatMul", "Gemm") and shape[-1] == scales:
            return len(shape) - 1
        if shape[0] == scales:
            return 0
    return None
