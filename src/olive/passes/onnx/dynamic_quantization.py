"""Integers with activations measured at each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, ModelInfo
from olive.passes.base import Cost, PassContext
from olive.passes.onnx import integer_params
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.integer_params import IntegerParams


class OnnxDynamicQuantization(GraphPass["OnnxDynamicQuantization.Params"]):
    """8-bit weights, and activations to 8 bits by the range that each run finds; needs no data."""

    class Params(IntegerParams):
        """Settings of every pass that makes integers of products."""

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """What the processor and the provider do with it."""
        yield from integer_params.check(model, params, machine, accelerator.execution_provider, static=False)

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """The quantiser holds the weights, and their integers."""
        return integer_params.cost(model)

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the graph into ``ctx.out``.

        Raises:
            PassFailed: nothing to quantise, a name that the graph does not have, or the quantiser failed.
        """
        from olive.passes.onnx.integer_graph import dynamic

        dynamic(model, params, ctx)
