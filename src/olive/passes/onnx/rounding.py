"""Weights to float16, and how far what stands for them is from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from olive.passes.onnx.graphs import Graph

_PART = 1 << 20  # values that are looked at together


def rounded(value: np.ndarray, low: float, high: float) -> tuple[np.ndarray, int, int]:
    """float32 to float16, to nearest, ties to even.

    Returns:
        the array, how many values were below ``low`` and not 0, and how many finite ones above ``high``, by
        magnitude.
    """
    import numpy as np

    size = np.abs(value)
    small, large = (size < low) & (size > 0), (size > high) & np.isfinite(size)
    few, many = int(small.sum()), int(large.sum())
    if few or many:
        value = np.where(small, np.copysign(np.float32(low), value), value)
        value = np.where(large, np.copysign(np.float32(high), value), value)
    return value.astype(np.float16), few, many


def relative_error(value: np.ndarray, other: np.ndarray) -> float:
    """Squared error over the sum of squares; infinite and NaN values aside; 0 for zeros."""
    import numpy as np

    flat, near = value.reshape(-1), other.reshape(-1)
    error = own = 0.0
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART].astype(np.float64)
        sound = np.isfinite(part)
        part = part[sound]
        error += float(np.square(part - near[start : start + _PART][sound].astype(np.float64)).sum())
        own += float(np.square(part).sum())
    return error / own if own else 0.0


def reader(graph: Graph, name: str) -> Callable[[], np.ndarray]:
    """Reads a weight as it is now, later."""
    from onnx import numpy_helper

    tensor = graph.weights[name]
    if tensor.data_location:
        view = graph.array(name)
        return lambda: view
    return lambda: numpy_helper.to_array(tensor)
