"""Float16 but for what needs float32."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.base import PassContext
from olive.passes.onnx.float16 import CPU, convert_and_write, on_cpu, refuse
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.graphs import Graph, open_graph

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16, above 0
_THROUGH = ("Add", "Cast", "Identity", "Reshape")  # an addition of a bias
_BLOCKED = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "Relu", "Add")


class OrtMixedPrecision(GraphPass["OrtMixedPrecision.Params"]):
    """Compute in float16, norms and additions in float32, and the head too where float16 does not hold it.

    The weights of the product that gives the first output tell whether the model was trained in float16:
    where rounding changes none of them by ``atol``, all weights are stored in float16; else that product and
    the first output stay float32.
    """

    class Params(PassParams):
        """Names of Olive 0.13."""

        op_block_list: tuple[str, ...] = Field(_BLOCKED, description="Types of operators that stay float32.")
        atol: float = Field(
            1e-6, ge=0, description="Change of a head's weight that says float16 does not hold it."
        )

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """What the target does with it."""
        if model.kind is not Kind.ONNX:
            yield from _check_bundle(accelerator.execution_provider)
        elif accelerator.execution_provider == CPU:
            yield on_cpu()

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the graph into ``ctx.out``.

        Raises:
            PassFailed: a bundle that would not run, or a graph without float32.
        """
        from olive.passes.onnx.half import Rules

        provider = ctx.target.execution_provider
        if model.kind is Kind.GENAI:
            refuse(_check_bundle(provider))
        graph = open_graph(model)
        output = graph.graph.output[0].name
        found = _head(graph, output)
        change = None
        if found is None:
            ctx.progress.note(f"no product with a weight gives {output}: op_block_list alone stays float32")
        else:
            change = _change(graph, found[1])
        exact = change is not None and change < params.atol
        keep, nodes = frozenset[str](), frozenset[str]()
        if found is not None and not exact:
            keep, nodes = frozenset((output,)), frozenset((found[0],))
        rules = Rules(
            provider, keep, frozenset(params.op_block_list), nodes, _SMALLEST, _LARGEST, force=exact
        )
        convert_and_write(self, graph, rules, ctx)
        ctx.facts.update(head=found[0] if found else None, head_change=change, head_float32=bool(nodes))


def _check_bundle(provider: str) -> Iterable[Problem]:
    if provider == CPU:
        yield Problem(
            f"float16 attention of a bundle fails on {CPU} at the second token",
            fix="Use OnnxFloatToFloat16 with keep_io_types true, or ModelBuilder with int8 or int4.",
        )


def _head(graph: Graph, output: str) -> tuple[str, str] | None:
    """Name and weight of the product that gives ``output``, additions and casts aside."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in _THROUGH:
        before = [makers[name] for name in node.input if name in makers]
        node = before[0] if len(before) == 1 else None
    if node is None or node.op_type not in ("MatMul", "Gemm"):
        return None
    if not node.name:
        node.name = f"{node.output[0]}_{node.op_type}"
    weight = next((name for name in node.input if name in graph.weights), None)
    return None if weight is None or graph.weights[weight].data_type != 1 else (node.name, weight)


def _change(graph: Graph, weight: str) -> float:
    """The largest change of a float32 weight by rounding to float16."""
    import numpy as np

    from olive.passes.onnx.rounding import rounded

    largest, flat = 0.0, graph.array(weight).reshape(-1)
    for start in range(0, flat.size, 1 << 22):
        part = flat[start : start + (1 << 22)]
        half = rounded(part, _SMALLEST, _LARGEST)[0].astype(np.float32)
        with np.errstate(invalid="ignore"):
            largest = max(largest, float(np.nanmax(np.abs(part - half), initial=0.0)))
    return largest
