"""Settings of the passes that make integers of weights and activations, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import AliasChoices, Field

from olive.config.base import PassParams
from olive.data.plan import Preview
from olive.errors import ConfigError, Problem, Severity
from olive.hardware.machine import Machine
from olive.hardware.probe import matrix_rate
from olive.models.artifact import Kind, ModelInfo
from olive.models.graph import takes_tokens
from olive.models.onnx_header import GraphInfo
from olive.passes.base import Cost
from olive.passes.onnx.feeds import FeedParams
from olive.passes.onnx.names import unknown
from olive.passes.quantize.calibration import ENOUGH, MINIMUM

Precision = Literal["int4", "uint4", "int8", "uint8", "int16", "uint16"]
Activation = Literal["int8", "uint8", "int16", "uint16"]
CPU = "CPUExecutionProvider"
OLDEST = 11  # version of the operators that the quantised ones fit
_OPTIONS = (
    "ActivationRestrictedAsymmetric", "AddQDQPairToWeight", "BlockSize", "CalibMovingAverage",
    "CalibMovingAverageConstant", "CalibPercentile", "CalibTensorRangeSymmetric", "DedicatedQDQPair",
    "EnableSubgraph", "ForceQuantizeNoInputCheck", "MatMulConstBOnly", "OpTypesToExcludeOutputQuantization",
    "QDQDisableWeightAdjustForInt32Bias", "QDQKeepRemovableActivations", "QDQOpTypePerChannelSupportToAxis",
    "QuantizeBias", "Sigmoid.nnapi", "extra.Sigmoid.nnapi", "UseQDQContribOps", "WeightSymmetric",
    "MinimumRealRange", "TensorQuantOverrides",
)  # fmt: skip
# Options that a parameter of the pass stands for, or that do not apply.
_ELSEWHERE = {
    "ActivationSymmetric": "use activation_symmetric",
    "SmoothQuant": "it needs neural-compressor, which is not a part of this product",
    "CalibStridedMinMax": "rows are looked at one by one anyway",
    "CalibMaxIntermediateOutputs": "rows are looked at one by one anyway",
}


class IntegerParams(PassParams):
    """Settings of every pass that makes integers of products; names of Olive 0.13."""

    precision: Precision = Field(
        "int8",
        validation_alias=AliasChoices("precision", "weight_type"),
        description="Integers of the weights.",
    )
    op_types_to_quantize: tuple[str, ...] | None = Field(
        None, description="Types of operators to quantise. Default: all that can be."
    )
    op_types_to_exclude: tuple[str, ...] | None = Field(
        None, description="Types of operators that stay; without effect beside op_types_to_quantize."
    )
    nodes_to_quantize: tuple[str, ...] | None = Field(
        None, description="Names or patterns of the only nodes to quantise."
    )
    nodes_to_exclude: tuple[str, ...] | None = Field(
        None, description="Names of nodes that stay, or patterns such as `*/down_proj/*`."
    )
    per_channel: bool = Field(False, description="A scale for each output of a weight.")
    reduce_range: bool = Field(
        False,
        description="Weights of 7 bits, for x86 processors without VNNI: their sums of products overflow.",
    )
    quant_preprocess: bool = Field(True, description="Fold constants and tell shapes before.")
    activation_symmetric: bool = Field(False, description="No zero points of activations.")
    weight_symmetric: bool | None = Field(
        None, description="No zero points of weights. Default: as signed integers have none, unsigned have."
    )
    extra_options: dict[str, Any] = Field(
        {}, description="Other options of onnxruntime's quantiser, by its names."
    )


class StaticParams(IntegerParams, FeedParams):
    """Settings of quantisation with ranges of activations that are found beforehand."""

    calibrate_method: Literal["MinMax", "Entropy", "Percentile"] = Field(
        "MinMax",
        description="Ranges of activations. `MinMax`: all that was seen; `Percentile`: but for the rarest "
        "magnitudes; `Entropy`: cut where least information is lost.",
    )
    calibration_providers: tuple[str, ...] | None = Field(
        None, description="Execution providers to calibrate on. Default: the CPU's."
    )
    quant_format: Literal["QDQ", "QOperator"] = Field(
        "QDQ",
        description="`QDQ`: pairs of QuantizeLinear and DequantizeLinear around operators, which every "
        "provider fuses as it can; `QOperator`: operators on integers.",
    )
    activation_type: Activation = Field("int8", description="Integers of the activations.")
    min_real_range: float | None = Field(
        None, gt=0, description="Ranges of activations are at least so wide."
    )
    tensor_quant_overrides: dict[str, list[dict[str, Any]]] | None = Field(
        None, description="Name of a value to its own quant_type, symmetric, rmin, rmax, scale or zero_point."
    )
    prepare_qdq_config: bool = Field(
        True,
        description="QDQ: quantise every standard operator, so that a processor of integers runs the whole "
        "graph; else those that gain by it.",
    )


def check(
    model: ModelInfo, params: IntegerParams, machine: Machine, provider: str, *, static: bool
) -> Iterable[Problem]:
    """Combinations that onnxruntime refuses, computes wrongly or slowly; names that are not in the graph."""
    yield from _check_options(params)
    if model.graph is not None:
        yield from _check_graph(model.graph, params)
    bits = int(params.precision.removeprefix("u").removeprefix("int"))
    if params.reduce_range and bits != 8:
        yield Problem(
            f"reduce_range takes a bit off 8-bit weights; precision is {params.precision}",
            where="reduce_range",
            fix="Set reduce_range false.",
        )
    if static and isinstance(params, StaticParams):
        yield from _check_static(params, bits, machine, provider)
        eight = params.activation_type == "uint8"
        if params.quant_format == "QDQ" and params.per_channel and params.weight_symmetric is False:
            yield Problem(
                "QDQ weights with a scale for each output are symmetric: weight_symmetric has no effect",
                where="weight_symmetric",
                severity=Severity.WARNING,
                fix="Leave it out, or set per_channel false.",
            )
    else:
        eight = True  # dynamic activations are uint8
        yield from _check_dynamic(params, bits, provider)
    x86 = "avx2" in machine.cpu_features
    vnni = bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(machine.cpu_features))
    if provider != CPU or not x86 or not eight or bits != 8:
        return
    if not vnni and params.precision == "int8" and not params.reduce_range:
        yield Problem(
            "this processor has no VNNI: sums of uint8 x int8 products overflow 16 bits, and large weights "
            "give wrong results",
            where="reduce_range",
            severity=Severity.WARNING,
            fix="Set reduce_range true, or precision and activation_type uint8.",
        )
    if vnni and params.reduce_range:
        yield Problem(
            "this processor has VNNI and needs no reduce_range, which costs a bit of the weights",
            where="reduce_range",
            severity=Severity.WARNING,
            fix="Set reduce_range false unless the model goes to older processors.",
        )


def _check_graph(graph: GraphInfo, params: IntegerParams) -> Iterable[Problem]:
    nodes = dict.fromkeys(node.name for node in graph.nodes)
    lists = {"nodes_to_quantize": params.nodes_to_quantize, "nodes_to_exclude": params.nodes_to_exclude}
    yield from unknown(graph.file, nodes, "node", lists)
    kinds = dict.fromkeys(node.op_type for node in graph.nodes)
    yield from unknown(graph.file, kinds, "operator", {"op_types_to_quantize": params.op_types_to_quantize})
    version = graph.opsets.get("", OLDEST)
    if version < OLDEST:
        yield Problem(
            f"{graph.file} has operators of version {version}; integers need {OLDEST} and later",
            fix="Export the model again with a later opset.",
        )


def _check_static(params: StaticParams, bits: int, machine: Machine, provider: str) -> Iterable[Problem]:
    activation, weight = params.activation_type, params.precision
    if params.data_config is None:
        yield Problem(
            "there is nothing to calibrate on: no data_config, and no fine-tuning before",
            where="data_config",
            fix="Name a data config, or use OnnxDynamicQuantization, which needs no data.",
        )
    for name in params.calibration_providers or ():
        if name not in machine.execution_providers:
            yield Problem(
                f"{name} does not run here, to calibrate on",
                where="calibration_providers",
                fix=f"Use one of {', '.join(machine.execution_providers)}.",
                exit_code=5,
            )
    if activation == "int8" and weight == "uint8":
        yield Problem(
            "onnxruntime has no kernel for int8 activations with uint8 weights",
            where="activation_type",
            fix="Use activation_type uint8, or precision int8.",
        )
    if params.quant_format == "QOperator":
        if bits != 8 or activation not in ("int8", "uint8"):
            yield Problem(
                f"there are no operators on {weight if bits != 8 else activation}: QOperator takes 8 bits",
                where="quant_format",
                fix="Use quant_format QDQ, or 8-bit integers.",
            )
        elif activation == "int8" and provider == CPU and "avx2" in machine.cpu_features:
            yield Problem(
                "on x86 processors onnxruntime runs int8 x int8 operators without vector instructions",
                where="activation_type",
                fix="Use activation_type uint8, or quant_format QDQ, which it turns to uint8 when it loads.",
            )
    elif provider == CPU and activation in ("int16", "uint16"):
        yield Problem(
            f"{CPU} has no operators on 16-bit activations: it expands them and computes in float32",
            where="activation_type",
            severity=Severity.WARNING,
            fix="Use activation_type uint8 for a faster model.",
        )
    if params.calibrate_method != "MinMax" and params.extra_options.get("CalibMovingAverage"):
        yield Problem(
            f"CalibMovingAverage averages minima and maxima; calibrate_method is {params.calibrate_method}",
            where="extra_options.CalibMovingAverage",
            fix="Use calibrate_method MinMax.",
        )
    percent = params.extra_options.get("CalibPercentile", 99.999)
    if not isinstance(percent, int | float) or not 0 < percent <= 100:
        yield Problem(
            f"CalibPercentile is {percent!r}, not in (0, 100]", where="extra_options.CalibPercentile"
        )


def _check_dynamic(params: IntegerParams, bits: int, provider: str) -> Iterable[Problem]:
    if bits != 8:
        yield Problem(
            f"dynamic quantisation has no operators on {params.precision} weights",
            where="precision",
            fix="Use int8 or uint8; for 4 bits OnnxKQuantQuantization, for 16 OnnxStaticQuantization.",
        )
    if params.activation_symmetric:
        yield Problem(
            "the operator that measures activations at run time gives them a zero point",
            where="activation_symmetric",
            fix="Leave it out, or use OnnxStaticQuantization.",
        )
    if provider != CPU:
        yield Problem(
            f"activations are measured by an operator that {provider} may not have: products then go to the "
            "CPU",
            severity=Severity.WARNING,
            fix="Use OnnxStaticQuantization with quant_format QDQ.",
        )


def _check_options(params: IntegerParams) -> Iterable[Problem]:
    for name in params.extra_options:
        where = f"extra_options.{name}"
        if name in _ELSEWHERE:
            yield Problem(
                f"{name} has no effect here",
                where=where,
                fix=f"Leave it out: {_ELSEWHERE[name]}.",
                severity=Severity.ERROR if name == "SmoothQuant" else Severity.WARNING,
            )
        elif name not in _OPTIONS:
            close = get_close_matches(name, _OPTIONS, n=1)
            yield Problem(
                f"onnxruntime's quantiser has no option {name!r}",
                where=where,
                fix=f"Did you mean {close[0]}?" if close else f"It has {', '.join(_OPTIONS)}.",
            )


def cost(model: ModelInfo) -> Cost:
    """Measured on 135M parameters: the quantiser holds the weights several times."""
    count = model.parameters
    return Cost(memory=(600 << 20) + 14 * count, disk=int(1.1 * count), seconds=2.0 + count * 6e-8)


def static_cost(
    model: ModelInfo, params: StaticParams, machine: Machine, data: Mapping[str, Preview]
) -> Cost:
    """With forward passes over the calibration data.

    Raises:
        ConfigError: a language model is given too few tokens, any other graph rows without its inputs.
    """
    plain, tokens = cost(model), 0
    found = data.get(params.data_config or "")
    text = model.kind is not Kind.ONNX or takes_tokens(model)
    if not text and found is not None and found.columns and model.graph is not None:
        missing = [one.name for one in model.graph.inputs if one.name not in found.columns]
        if missing:
            raise ConfigError(
                problems=[
                    Problem(
                        f"{found.name} has no column {missing[0]!r}, an input of {model.graph.file}; "
                        f"it has {', '.join(found.columns)}",
                        where="data_config",
                        fix='Give each row one column an input, as nested lists: {"x": [[0.1, 0.2]]}.',
                    )
                ]
            )
    if text:
        tokens = params.calibration_tokens
        if found is not None and found.tokens:
            tokens = min(tokens, found.tokens)
        if tokens < MINIMUM:
            raise ConfigError(
                problems=[
                    Problem(
                        f"{params.data_config} has {tokens} tokens; a calibration needs at least {MINIMUM}",
                        where="data_config",
                        fix=f"Name data of {ENOUGH} tokens and more, or use OnnxDynamicQuantization.",
                    )
                ]
            )
    rate = matrix_rate(machine, "float32")
    passes = 1 if params.calibrate_method == "MinMax" else 2
    if rate is None or plain.seconds is None:
        return plain
    seconds = plain.seconds + passes * 2.0 * model.parameters * tokens / (0.3 * rate)
    return plain.model_copy(update={"seconds": seconds})
