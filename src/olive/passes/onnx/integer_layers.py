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
        spread = _spread(scales, weight.shape, axis)
        offsets = _spread(zeros, weight.shape, axis)
        if spread is None or offsets is None:
            continue
        stands_for = (codes.reshape(weight.shape) - offsets) * spread
        error = relative_error(weight, stands_for)
        rows.append(
            {
                "name": name,
                "bits": bits,
                "group_size": int(weight.size // scales.size) if scales.size == 1 or scales.ndim > 1 else -1,
                "scales": int(scales.size),
                "weight_error": error,
            }
        )
    return rows


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray | None:
    """Scales or zero points as they broadcast over a weight; None where they do not.

    Args:
        values: one, one for each place on ``axis``, or, of blocks, as many dimensions as the weight.
        shape: of the weight.
        axis: of the outputs, or that blocks lie along.
    """
    if values.size == 1:
        return values.reshape(())
    if values.ndim == len(shape) > 1:
        block = -(-shape[axis] // values.shape[axis])
        made = values.repeat(block, axis)
        wide = made.take(range(shape[axis]), axis)
        return wide if wide.shape == shape else None
    if axis >= len(shape) or shape[axis] != values.size:
        return None
    return values.reshape([values.size if place == axis else 1 for place in range(len(shape))])


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
