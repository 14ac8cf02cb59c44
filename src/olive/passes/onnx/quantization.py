"""Integers of weights and activations, static or dynamic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, ModelInfo
from olive.passes.base import Cost, PassContext
from olive.passes.onnx import integer_params
from olive.passes.onnx.graph_pass import GraphPass
from olive.passes.onnx.integer_params import IntegerParams, StaticParams

_CALIBRATION = StaticParams.model_fields.keys() - IntegerParams.model_fields.keys() - {"data_config"}


class OnnxQuantization(GraphPass["OnnxQuantization.Params"]):
    """OnnxStaticQuantization or OnnxDynamicQuantization, by a parameter."""

    class Params(StaticParams):
        """Settings of quantisation with calibration; in dynamic mode those of calibration have no effect."""

        quant_mode: Literal["static", "dynamic"] = Field(
            "static",
            description="`static`: ranges of activations by calibration; `dynamic`: measured at each run.",
        )

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As the pass of the mode."""
        static = params.quant_mode == "static"
        yield from integer_params.check(model, params, machine, accelerator.execution_provider, static=static)
        unread = sorted(params.model_fields_set & _CALIBRATION) if not static else []
        if unread:
            yield Problem(
                f"quant_mode dynamic does not read {', '.join(unread)}",
                where=unread[0],
                severity=Severity.WARNING,
                fix="Leave them out, or set quant_mode static.",
            )

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """As the pass of the mode."""
        if params.quant_mode == "static":
            return integer_params.static_cost(model, params, machine, data)
        return integer_params.cost(model)

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the graph into ``ctx.out``.

        Raises:
            ConfigError: calibration data that does not fit the graph.
            PassFailed: nothing to quantise, a name that is not in the graph, NaN, or the quantiser failed.
        """
        from olive.passes.onnx.integer_graph import dynamic, static

        if params.quant_mode == "static":
            static(model, params, ctx)
        else:
            dynamic(model, params, ctx)
