"""What passes on ONNX graphs share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from olive.config.base import PassParams
from olive.data.plan import Preview
from olive.hardware.machine import Machine
from olive.models.artifact import Kind, ModelInfo
from olive.passes.base import Cost, Pass, PassContext

if TYPE_CHECKING:
    from olive.passes.onnx.graphs import Graph

P = TypeVar("P", bound=PassParams)


class GraphPass(Pass[P]):
    """A pass that changes an ONNX graph: a plain one stays one, a bundle of onnxruntime-genai stays one."""

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.ONNX, Kind.GENAI)
    produces: ClassVar[Kind] = Kind.ONNX
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    gates: ClassVar[tuple[str, ...]] = ("graph",)
    hardware: ClassVar[tuple[str, ...]] = ("execution_provider",)
    keeps_kind: ClassVar[bool] = True

    @classmethod
    def gates_of(cls, given: Kind) -> tuple[str, ...]:
        """A bundle is held as an export is; a plain graph against the one it was made of."""
        return ("parity", "bundle") if given is Kind.GENAI else cls.gates

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """A part of a weight in floating point, and the largest weight's integers."""
        folder = model.path if model.path.is_dir() else model.path.parent
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return Cost(memory=(700 << 20) + size // 8, disk=size, seconds=2.0 + size * 2e-8)

    def write(self, graph: Graph, ctx: PassContext, task: str) -> int:
        """Write the changed graph and what else is in its folder; ``task`` is what the bar says.

        Returns:
            Bytes of the graph and its weights.
        """
        graph.drop_unused()
        ctx.progress.start(task, len(graph.weights))
        done = iter(range(1, len(graph.weights) + 1))
        path = graph.save(ctx.out, done=lambda _: ctx.progress.update(next(done)))
        ctx.progress.finish()
        graph.copy_rest(ctx.out)
        data = path.with_name(f"{path.name}.data")
        return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
