"""Float32 graphs in float16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.errors import PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.base import PassContext
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.graphs import Graph, open_graph
from olive.passes.onnx.names import named, unknown

if TYPE_CHECKING:
    from olive.passes.onnx.half import Converted, Rules

CPU = "CPUExecutionProvider"
ATTENTION = "GroupQueryAttention"


class OnnxFloatToFloat16(GraphPass["OnnxFloatToFloat16.Params"]):
    """Store weights in float16 and compute in float16 wherever the execution provider does.

    A cast stands only where a value goes from one to the other. Where the provider has no float16 kernel, the
    node computes in float32 on rounded weights; operators and nodes that the document blocks keep theirs.
    """

    class Params(PassParams):
        """Names of Olive 0.13."""

        min_positive_val: float = Field(
            1e-7, ge=0, description="Weights of a smaller magnitude become this; 0 stays."
        )
        max_finite_val: float = Field(
            1e4, gt=0, le=65504, description="Finite weights of a larger magnitude become this."
        )
        keep_io_types: bool | tuple[str, ...] = Field(
            False, description="Inputs and outputs that stay float32: all, or those named."
        )
        op_block_list: tuple[str, ...] | None = Field(
            None,
            description="Types of operators that stay float32. Default: those without float16 and those that "
            "need more digits, such as Range and CumSum.",
        )
        op_include_list: tuple[str, ...] | None = Field(
            None, description="Types of operators that become float16, and no others."
        )
        node_block_list: tuple[str, ...] | None = Field(
            None, description="Names of nodes that stay float32, or patterns such as `*/lm_head/*`."
        )
        node_include_list: tuple[str, ...] | None = Field(
            None, description="Names or patterns of nodes that become float16, and no others."
        )

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Lists that exclude each other; what the target does with a bundle in float16."""
        for kind, block, include in (
            ("op", params.op_block_list, params.op_include_list),
            ("node", params.node_block_list, params.node_include_list),
        ):
            if block is not None and include is not None:
                yield Problem(
                    f"{kind}_block_list and {kind}_include_list exclude each other",
                    where=f"{kind}_include_list",
                    fix="Name what stays float32, or what becomes float16.",
                )
        if params.min_positive_val >= params.max_finite_val:
            yield Problem(
                f"min_positive_val {params.min_positive_val:g} is not below max_finite_val "
                f"{params.max_finite_val:g}",
                where="min_positive_val",
            )
        if model.graph is not None:
            graph, keep = model.graph, params.keep_io_types
            nodes = dict.fromkeys(node.name for node in graph.nodes)
            lists = {"node_block_list": params.node_block_list, "node_include_list": params.node_include_list}
            yield from unknown(graph.file, nodes, "node", lists)
            values = [one.name for one in (*graph.inputs, *graph.outputs)]
            kept = {"keep_io_types": () if isinstance(keep, bool) else keep}
            yield from unknown(graph.file, values, "input or output", kept)
        if model.kind is not Kind.ONNX:
            yield from check_bundle(params.keep_io_types, accelerator.execution_provider)
        elif accelerator.execution_provider == CPU:
            yield on_cpu()

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the graph in float16 into ``ctx.out``.

        Raises:
            PassFailed: a name that the graph does not have, or a bundle that would not run.
        """
        from olive.passes.onnx.half import DEFAULT_BLOCKED, Rules

        if model.kind is Kind.GENAI:
            refuse(check_bundle(params.keep_io_types, ctx.target.execution_provider))
        graph = open_graph(model)
        nodes = dict.fromkeys(node.name for node in graph.graph.node)
        kinds = dict.fromkeys(node.op_type for node in graph.graph.node)
        values = [one.name for one in (*graph.graph.input, *graph.graph.output)]
        keep = params.keep_io_types
        if not isinstance(keep, bool):
            keep = tuple(named(keep, values, "input or output", graph))
        blocked: Iterable[str] = DEFAULT_BLOCKED if params.op_block_list is None else params.op_block_list
        if params.op_include_list is not None:
            blocked = kinds.keys() - set(named(params.op_include_list, kinds, "operator", graph))
        left: Iterable[str] = named(params.node_block_list or (), nodes, "node", graph)
        if params.node_include_list is not None:
            left = nodes.keys() - set(named(params.node_include_list, nodes, "node", graph))
        rules = Rules(
            provider=ctx.target.execution_provider,
            keep=keep if isinstance(keep, bool) else frozenset(keep),
            operators=frozenset(blocked),
            nodes=frozenset(left),
            low=params.min_positive_val,
            high=params.max_finite_val,
        )
        convert_and_write(self, graph, rules, ctx)


def check_bundle(keep: bool | tuple[str, ...], provider: str) -> Iterable[Problem]:
    """Why a bundle would not run in float16."""
    if provider == CPU and keep is not True:
        yield Problem(
            f"float16 {ATTENTION} fails on {CPU} at the second token",
            where="keep_io_types",
            fix="Set keep_io_types true: the key-value cache and attention stay float32, weights are stored "
            "in float16. Or use ModelBuilder with precision int8 or int4.",
        )
    if provider != CPU and keep is True:
        yield Problem(
            f"on {provider} past and present keys share one buffer, which a cast between them would part",
            where="keep_io_types",
            fix='Set keep_io_types false, or name outputs that are no keys or values: ["logits"].',
        )


def on_cpu() -> Problem:
    """What float16 means on a CPU."""
    return Problem(
        f"{CPU} multiplies in float32: float16 makes the file smaller and not the run faster",
        severity=Severity.WARNING,
        fix="Use OnnxDynamicQuantization or OnnxStaticQuantization for a faster model.",
    )


def refuse(problems: Iterable[Problem]) -> None:
    """Raise the first of ``problems``.

    Raises:
        PassFailed: there is one.
    """
    for problem in problems:
        raise PassFailed(problem.message, where=problem.where, fix=problem.fix)


def convert_and_write(technique: GraphPass[Any], graph: Graph, rules: Rules, ctx: PassContext) -> Converted:
    """Convert ``graph`` and write it, with what else is in its folder.

    Raises:
        PassFailed: there is nothing to convert.
    """
    from olive.passes.onnx.half import convert

    done = convert(graph, rules)
    if not done.nodes and not done.weights:
        raise PassFailed(
            f"{graph.path.name} has nothing in float32 that may become float16",
            fix="Look at op_block_list and node_block_list, and at the precision of the model.",
        )
    technique.write(graph, ctx, "float16")
    many = {name: above for name, (_, above) in done.clipped.items() if above}
    if many:
        ctx.progress.note(
            f"{sum(many.values()):,} values above {rules.high:g} were clipped, in {', '.join(list(many)[:3])}"
        )
    ctx.attributes.update(precision="fp16", execution_provider=rules.provider)
    ctx.facts.update(
        precision="fp16",
        nodes=done.nodes,
        casts=done.casts,
        layers=_table(done),
    )
    return done


def _table(done: Converted) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, error in done.errors.items():
        few, many = done.clipped.get(name, (0, 0))
        rows.append({"name": name, "bits": 16, "weight_error": error, "raised": few, "clipped": many})
    return rows
