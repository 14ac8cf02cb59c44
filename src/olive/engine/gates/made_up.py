"""Inputs for a graph of which nothing is known but its declaration: seeded, in its shapes and dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive.passes.onnx.feeds import inputs_of

if TYPE_CHECKING:
    import numpy as np

    from olive.passes.onnx.graphs import Graph

_BATCH, _LENGTH = 2, 8


def inputs(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """One input of each name.

    Floats are standard normal; whole numbers are below the rows of the table they look up, or 0 and 1; a mask
    is all ones. A size that the graph names is the same everywhere: 2 in a batch, none in the past, else 8.
    """
    import numpy as np

    draw = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for one in inputs_of(graph):
        shape = tuple(
            size if isinstance(size, int) else _size(size or "", place)
            for place, size in enumerate(one.shape)
        )
        if "mask" in one.name or one.dtype.kind == "b":
            made[one.name] = np.ones(shape, one.dtype)
        elif one.dtype.kind in "iu":
            made[one.name] = draw.integers(0, _below(graph, one.name), shape).astype(one.dtype)
        else:
            made[one.name] = draw.standard_normal(shape).astype(one.dtype)
    return made


def _size(name: str, place: int) -> int:
    if "past" in name and "total" not in name and "+" not in name:
        return 0
    return _BATCH if "batch" in name or (not name and place == 0) else _LENGTH


def _below(graph: Graph, name: str) -> int:
    """Rows of the smallest table that is looked up with this input; 2 where there is none."""
    rows = [
        graph.shape(node.input[0])[0]
        for node in graph.readers(name)
        if node.op_type == "Gather" and node.input[0] in graph.weights and node.input[1] == name
    ]
    return min(rows, default=2)
