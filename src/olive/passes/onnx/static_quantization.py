"""Integers with ranges of activations that are found beforehand."""

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
from olive.passes.onnx.integer_params import StaticParams


class OnnxStaticQuantization(GraphPass["OnnxStaticQuantization.Params"]):
    """Integers of weights, and of activations by the ranges that calibration data gives them."""

    class Params(StaticParams):
        """Settings of quantisation with calibration."""

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Data, and what the processor and the provider do with the integers."""
        yield from integer_params.check(model, params, machine, accelerator.execution_provider, static=True)

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """Calibration, and the quantiser, which holds the weights and their integers."""
        return integer_params.static_cost(model, params, machine, data)

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Calibrate, and write the graph into ``ctx.out``.

        Raises:
            ConfigError: calibration data that does not fit the graph.
            PassFailed: nothing to quantise, a name that is not in the graph, NaN, or the quantiser failed.
        """
        from olive.passes.onnx.integer_graph import static

        static(model, params, ctx)
