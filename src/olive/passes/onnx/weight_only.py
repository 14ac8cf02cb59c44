"""What the passes share that turn weights of ONNX graphs into integers for MatMulNBits.

The operator has the blocks of our grids: along the inputs, low bits first (``quantization/packing.py``). A
width that blocks do not divide is filled up with zeros, as its layout asks.
Source: com.microsoft MatMulNBits and GatherBlockQuantized of ONNX Runtime's ContribOperators.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.errors import PassFailed, Problem
from olive.hardware.machine import Machine
from olive.hardware.products import choose_products
from olive.models.artifact import Artifact, ModelInfo
from olive.passes.base import PassContext
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.graphs import Graph, Stored, open_graph
from olive.passes.onnx.products import Found, Product, find, fresh, unknown
from olive.passes.onnx.weights import (
    DOMAIN,
    UINT8,
    Error,
    dtype_of,
    error_of,
    in_parts,
    product_nodes,
    raw,
    row_of,
)
from olive.passes.quantize import kernels

if TYPE_CHECKING:
    import torch
    from onnx import NodeProto

    from olive.quantization.grid import Grid, Quantised

Bits = Literal[2, 4, 8]
Block = Literal[16, 32, 64, 128, 256]


class NodeParams(PassParams):
    """Which nodes."""

    nodes_to_exclude: tuple[str, ...] = Field((), description="Names of nodes that stay in floating point.")


class WeightOnlyParams(NodeParams):
    """Settings of the passes that make MatMulNBits; names of Olive 0.13."""

    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        0,
        description="What the inputs of a product may be rounded to at run time: 1 float32, 2 float16, "
        "3 bfloat16, 4 int8; 0: as they are.",
    )


P = TypeVar("P", bound=NodeParams)
W = TypeVar("W", bound=WeightOnlyParams)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a weight is quantised.

    Attributes:
        bits: of a code.
        block: weights that share a scale.
        symmetric: no zero points.
    """

    bits: int
    block: int
    symmetric: bool

    @property
    def grid(self) -> Grid:
        """Its grid."""
        from olive.quantization.grid import Grid

        return Grid(self.bits, self.block, "full_range" if self.symmetric else "asymmetric")


class WeightPass(GraphPass[P]):
    """A pass that finds products, makes other weights of theirs, one at a time, and says what that cost."""

    libraries = ("onnx", "onnxruntime", "torch")
    hardware = ("device", "execution_provider")

    def named(self, params: P) -> dict[str, Iterable[str]]:
        """Parameter -> the nodes that it names."""
        return {"nodes_to_exclude": params.nodes_to_exclude}

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Names of nodes, where the input is a graph."""
        if model.graph is not None:
            nodes = (node.name for node in model.graph.nodes)
            yield from unknown(nodes, model.graph.file, self.named(params))

    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Quantise the graph of ``model`` into ``ctx.out``.

        Raises:
            PassFailed: a weight is NaN or infinite, an unknown node, or nothing to quantise.
        """
        import torch

        began = time.perf_counter()
        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
            choose_products(ctx.machine.cpu, ctx.machine.cpu_features)
        graph = open_graph(model)
        found = self.find(graph, params, ctx.target.execution_provider)
        if not found.products:
            reasons = "".join(f"; {label}: {reason}" for label, reason in list(found.left.items())[:3])
            raise PassFailed(
                f"{graph.path.name} has no product with a weight in floating point to quantise{reasons}",
                fix="Give a model in floating point, or change nodes_to_exclude.",
            )
        rows: dict[str, dict[str, Any]] = {}
        nodes = self.quantise_products(graph, found.products, params, ctx, rows)
        graph.replace(nodes)
        graph.need_opset(DOMAIN, 1)
        size = self.write(graph, ctx, "quantise")
        self._report(found, list(rows.values()), ctx, size, time.perf_counter() - began)

    @abstractmethod
    def find(self, graph: Graph, params: P, provider: str) -> Found:
        """What to quantise."""

    @abstractmethod
    def quantise_products(
        self,
        graph: Graph,
        products: list[Product],
        params: P,
        ctx: PassContext,
        rows: dict[str, dict[str, Any]],
    ) -> dict[int, list[NodeProto]]:
        """Put the new weights into the graph; a weight writes its line into ``rows`` when it is made.

        Returns:
            Position of a node -> the nodes that stand there then.
        """

    def _report(
        self, found: Found, rows: list[dict[str, Any]], ctx: PassContext, size: int, seconds: float
    ) -> None:
        ctx.attributes["precision"] = f"int{min(row['bits'] for row in rows)}"
        ctx.facts |= {
            "method": type(self).__name__,
            "layers": rows,
            "products": len(found.products),
            "left": [{"name": label, "reason": reason} for label, reason in found.left.items()],
            "bytes": size,
            "seconds": round(seconds, 3),
        }
        ctx.series["quantisation"] = [
            {"step": float(number), "weight_error": row["weight_error"]} for number, row in enumerate(rows)
        ]
        for label, reason in found.left.items():
            if reason != "in nodes_to_exclude":
                ctx.progress.note(f"{label} stays in floating point: {reason}")


class WeightOnly(WeightPass[W]):
    """A pass that makes MatMulNBits of products, and GatherBlockQuantized of look-ups where it is told to.

    Attributes:
        embeddings: whether look-ups are taken.
    """

    embeddings: ClassVar[bool] = False

    @abstractmethod
    def settings(self, params: W, label: str | None = None) -> Settings:
        """How the weight of the node ``label`` is quantised; of None, where nothing is said of a node."""

    @abstractmethod
    def quantise(self, weight: torch.Tensor, grid: Grid, params: W) -> Quantised:
        """Quantise some rows, float32 (rows, columns), whose blocks are whole."""

    def all_settings(self, params: W) -> Iterable[Settings]:
        """Every setting that the parameters name."""
        yield self.settings(params)

    def check(
        self, model: ModelInfo, params: W, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Names of nodes, and kernels of the target."""
        yield from super().check(model, params, machine, accelerator)
        pairs = {(one.bits, one.block) for one in self.all_settings(params)}
        yield from kernels.problems(pairs, accelerator.execution_provider, where="block_size")

    def find(self, graph: Graph, params: W, provider: str) -> Found:
        """Products, and look-ups where the provider's kernel was verified."""
        kinds = ("MatMul", "Gemm", "Gather") if self.embeddings else ("MatMul", "Gemm")
        found = find(graph, kinds, **self.named(params))
        for one in [one for one in found.products if one.kind == "Gather"]:
            settings = self.settings(params, one.label)
            reason = None
            if settings.bits not in kernels.EMBEDDINGS.get(provider, ()):
                reason = f"no verified GatherBlockQuantized of {provider} with {settings.bits} bits"
            elif one.columns * settings.bits % 8:
                reason = f"rows of {one.columns} weights do not fill bytes"
            if reason is not None:
                found.products.remove(one)
                found.left[one.label] = reason
        return found

    def quantise_products(
        self,
        graph: Graph,
        products: list[Product],
        params: W,
        ctx: PassContext,
        rows: dict[str, dict[str, Any]],
    ) -> dict[int, list[NodeProto]]:
        """Integers of each weight once for all nodes that read it in the same way."""
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        names: dict[tuple[str, bool, bool, Settings], tuple[str, ...]] = {}
        made: dict[int, list[NodeProto]] = {}
        for one in sorted(products, key=lambda one: one.kind == "Gather"):
            settings = self.settings(params, one.label)
            node, table = graph.graph.node[one.place], one.kind == "Gather"
            # where rows are whole blocks, a look-up reads the bytes of a product
            shared = table and one.columns % settings.block == 0
            key = one.weight, one.stored, False, settings
            if not (shared and key in names):
                key, shared = (one.weight, one.stored, table, settings), False
            if key not in names:
                names[key] = _names(graph, one.weight, settings)
                graph.put(names[key], partial(self._parts, graph, one, settings, params, device, rows))
            name = f"{node.name}_Q{settings.bits}" if node.name else ""
            form = {"bits": settings.bits, "block_size": settings.block}
            if table:
                made[one.place] = _look_up(graph, node, one, names[key], name, form, shared=shared)
            else:
                if params.accuracy_level:
                    form["accuracy_level"] = params.accuracy_level
                form |= {"K": one.columns, "N": one.rows}
                made[one.place] = product_nodes(node, "MatMulNBits", names[key], name, form)
        return made

    def _parts(
        self,
        graph: Graph,
        one: Product,
        settings: Settings,
        params: W,
        device: str,
        rows: dict[str, dict[str, Any]],
    ) -> tuple[Stored, ...]:
        """Packed codes, scales and zero points of a weight."""
        import torch

        from olive.quantization.grid import Quantised, encode
        from olive.quantization.packing import pack

        began = time.perf_counter()
        grid, dtype = settings.grid, dtype_of(one)
        blocks = -(-one.columns // settings.block)
        kept = one.columns if one.kind == "Gather" else blocks * settings.block
        packed = torch.empty(one.rows, kept * settings.bits // 8, dtype=torch.uint8)
        scales = torch.empty(one.rows, blocks, dtype=dtype)
        zeros = None
        if not settings.symmetric:
            zeros = torch.empty(one.rows, -(-blocks * settings.bits // 8), dtype=torch.uint8)

        def part(place: slice, weight: torch.Tensor) -> Error:
            whole = self.quantise(weight, grid, params)
            stored, codes = whole.scales.to(dtype).float(), whole.codes
            if dtype != torch.float32:
                codes = encode(weight, grid, stored, whole.zeros)
            error = error_of(weight, Quantised(grid, codes, stored, whole.zeros).dequantise())
            codes[:, one.columns :] = 0
            packed[place] = pack(codes[:, :kept], settings.bits).cpu()
            scales[place] = stored.to(dtype).cpu()
            if zeros is not None and whole.zeros is not None:
                odd = (0, zeros.shape[1] * 8 // settings.bits - blocks)
                points = torch.nn.functional.pad(whole.zeros, odd, value=grid.middle)
                zeros[place] = pack(points, settings.bits).cpu()
            return error

        errors = in_parts(graph, one, device, part, settings.block)
        rows[one.label] = row_of(one, settings.bits, settings.block, errors, began)
        shape: tuple[int, ...] = (one.rows, packed.shape[1])
        if one.kind != "Gather":
            shape = (one.rows, blocks, settings.block * settings.bits // 8)
        parts = [
            Stored(packed.numpy(), UINT8, shape),
            Stored(raw(scales), one.data_type, (one.rows, blocks)),
        ]
        if zeros is not None:
            parts.append(Stored(zeros.numpy(), UINT8, tuple(zeros.shape)))
        return tuple(parts)


def _names(graph: Graph, weight: str, settings: Settings) -> tuple[str, ...]:
    """As ONNX Runtime's quantiser names them; longer where a weight is quantised in several ways."""
    code = f"{weight}_Q{settings.bits}"
    parts = ["scales"] if settings.symmetric else ["scales", "zero_points"]
    taken = graph.weights.keys()
    first = fresh(taken, code, f"{code}G{settings.block}")
    return (first, *(fresh(taken, f"{weight}_{part}", f"{first}_{part}") for part in parts))


def _look_up(
    graph: Graph,
    node: NodeProto,
    one: Product,
    names: tuple[str, ...],
    name: str,
    form: Mapping[str, int],
    *,
    shared: bool,
) -> list[NodeProto]:
    """GatherBlockQuantized in the place of a Gather; of a product's weight, in the shape it wants."""
    import numpy as np
    from onnx.helper import make_node

    data, made = names[0], []
    if shared:
        shape, data = fresh(graph.weights, f"{names[0]}_shape"), f"{names[0]}_rows"
        graph.put_array(shape, np.array([one.rows, one.columns * form["bits"] // 8], dtype=np.int64))
        made.append(make_node("Reshape", [names[0], shape], [data], f"{name}_rows" if name else ""))
    inputs = [data, node.input[1], *names[1:]]
    axes = {"gather_axis": 0, "quantize_axis": 1}
    kind = "GatherBlockQuantized"
    return [*made, make_node(kind, inputs, list(node.output), name, domain=DOMAIN, **axes, **form)]
