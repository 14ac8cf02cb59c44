"""A weight of a graph as float32 rows, part by part, and the operators of ONNX Runtime that take others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from olive.errors import PassFailed
from olive.passes.onnx.graphs import Graph
from olive.passes.onnx.products import Product

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto

DOMAIN = "com.microsoft"
UINT8 = 2  # TensorProto.DataType
_PART = 1 << 18  # weights of a part: its buffers stay in a core's caches
_PART_OF_A_GPU = 1 << 24
_ROWS = 256  # a part has whole blocks even where they run over the ends of rows

R = TypeVar("R")


class Error(NamedTuple):
    """Squared error, and the sum of squares, of some weights."""

    lost: float
    own: float


def error_of(weight: torch.Tensor, expanded: torch.Tensor) -> Error:
    """Of a weight and what its integers stand for."""
    return Error(float((expanded - weight).square_().sum()), float(weight.square().sum()))


def row_of(one: Product, bits: int, block: int, errors: Iterable[Error], began: float) -> dict[str, Any]:
    """What the report says of a weight, as of the layers of other quantisers."""
    lost, own = map(sum, zip(*errors, strict=True))
    return {
        "name": one.label,
        "bits": bits,
        "group_size": block,
        "weight_error": lost / own if own else 0.0,
        "seconds": round(time.perf_counter() - began, 4),
    }


def in_parts(
    graph: Graph, one: Product, device: str, work: Callable[[slice, torch.Tensor], R], block: int = 1
) -> list[R]:
    """Do something to some rows of a weight at a time; on a CPU a part a thread.

    Args:
        graph: that the weight was read with.
        one: whose weight.
        device: of the rows.
        work: given which rows, and float32 (rows, columns), filled up with zeros to whole blocks.
        block: weights of a block.

    Returns:
        What ``work`` gave, in the order of the rows.

    Raises:
        PassFailed: the weight has NaN or infinity.
    """
    import numpy as np
    import torch

    from olive.quantization.threads import one_thread_an_operation

    array = graph.read(one.weight)
    most = _PART if device == "cpu" else _PART_OF_A_GPU
    step = max(_ROWS, most // one.columns // _ROWS * _ROWS)
    short = -one.columns % block

    def part(first: int) -> R:
        rows = slice(first, min(first + step, one.rows))
        wide = np.array(array[rows] if one.stored else array[:, rows].T, dtype=np.float32, order="C")
        weight = torch.from_numpy(wide).to(device)
        if not bool(torch.stack(weight.aminmax()).isfinite().all()):
            every = np.asarray(array, dtype=np.float32)
            raise PassFailed(
                f"{one.weight} has {int((~np.isfinite(every)).sum())} values that are NaN or infinite",
                fix="Look at what made this model; of a fine-tuning, lower the learning rate.",
            )
        return work(rows, torch.nn.functional.pad(weight, (0, short)) if short else weight)

    firsts = range(0, one.rows, step)
    if device != "cpu":
        return [part(first) for first in firsts]
    with one_thread_an_operation() as threads, ThreadPoolExecutor(threads) as pool:
        return list(pool.map(part, firsts))


def raw(values: torch.Tensor) -> Any:
    """The bits of a tensor as an array; numpy itself has no bfloat16."""
    import torch

    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()


def dtype_of(one: Product) -> torch.dtype:
    """Of the weight as it is stored."""
    import torch

    return {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}[one.data_type]


def product_nodes(
    node: NodeProto, kind: str, weights: Iterable[str], name: str, settings: Mapping[str, int]
) -> list[NodeProto]:
    """An operator of ONNX Runtime in the place of a MatMul or Gemm; a bias is added behind it."""
    from onnx.helper import make_node

    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = f"{node.output[0]}_product" if bias else node.output[0]
    made = [make_node(kind, [node.input[0], *weights], [output], name, domain=DOMAIN, **settings)]
    if bias:
        made.append(make_node("Add", [output, bias], list(node.output), f"{name}_Add" if name else ""))
    return made
