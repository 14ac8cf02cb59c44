"""A weight of a graph as float32 rows, part by part, and the operators of ONNX Runtime that take others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed
from olive.passes.onnx.graphs import Graph
from olive.passes.onnx.products import Product

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto

DOMAIN = "com.microsoft"
UINT8 = 2  # TensorProto.DataType
_PART = 1 << 22  # weights in floating point at a time


@dataclass(slots=True)
class Error:
    """Squared error over the sum of squares, part by part."""

    lost: float = 0.0
    own: float = 0.0

    def add(self, weight: torch.Tensor, expanded: torch.Tensor) -> None:
        """Count a part and what its integers stand for."""
        self.lost += float((expanded - weight).square().sum())
        self.own += float(weight.square().sum())

    @property
    def share(self) -> float:
        """0 for a weight of zeros."""
        return self.lost / self.own if self.own else 0.0


def weight_parts(
    graph: Graph, one: Product, device: str, block: int = 1
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows of a weight at a time, float32 (rows, columns), filled up with zeros to whole blocks.

    Raises:
        PassFailed: the weight has NaN or infinity.
    """
    import numpy as np
    import torch

    array = graph.read(one.weight)
    step = max(256, _PART // one.columns // 256 * 256)
    short = -one.columns % block
    for first in range(0, one.rows, step):
        part = slice(first, min(first + step, one.rows))
        wide = np.array(array[part] if one.stored else array[:, part].T, dtype=np.float32, order="C")
        weight = torch.from_numpy(wide).to(device)
        if not bool(torch.stack(weight.aminmax()).isfinite().all()):
            every = np.asarray(array, dtype=np.float32)
            raise PassFailed(
                f"{one.weight} has {int((~np.isfinite(every)).sum())} values that are NaN or infinite",
                fix="Look at what made this model; of a fine-tuning, lower the learning rate.",
            )
        yield part, torch.nn.functional.pad(weight, (0, short)) if short else weight


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
