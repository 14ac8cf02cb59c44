"""Weights and activations to integers by onnxruntime's quantiser, in a folder that is removed afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.export.quiet import captured
from olive.passes.onnx import feeds, preprocess, ranges
from olive.passes.onnx.graphs import Graph, open_graph
from olive.passes.onnx.integer_layers import table
from olive.passes.onnx.names import named

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from olive.passes.base import PassContext
    from olive.passes.onnx.integer_params import IntegerParams, StaticParams

_TYPES = {
    "int4": "QInt4", "uint4": "QUInt4", "int8": "QInt8", "uint8": "QUInt8", "int16": "QInt16",
    "uint16": "QUInt16",
}  # fmt: skip
_NEVER = frozenset({"Cast", "QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan"})
_NATIVE = 21  # version of the operators whose QuantizeLinear takes 4 and 16 bits
_MARK = "onnx.infer"


@dataclass(frozen=True, slots=True)
class _Work:
    """A graph that is ready.

    Attributes:
        source: as it was given.
        opset: version of its operators now.
        path: of the graph that is quantised.
        folder: to write into, removed afterwards.
        plain: whether it is no bundle.
        kinds: types of its operators, of the standard ones, in order.
        chosen: names of the only nodes to quantise; empty: all.
        without: names of nodes that stay.
    """

    source: Graph
    opset: int
    path: Path
    folder: Path
    plain: bool
    kinds: tuple[str, ...]
    chosen: list[str]
    without: list[str]


def dynamic(model: Artifact, params: IntegerParams, ctx: PassContext) -> None:
    """Weights to integers, activations measured at each run.

    Raises:
        PassFailed: nothing to quantise, a name that the graph does not have, or the quantiser failed.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(model, params, ctx) as work:
        made = work.folder / "quantised.onnx"
        with _quantiser(made):
            quantize_dynamic(
                work.path,
                made,
                op_types_to_quantize=list(params.op_types_to_quantize or ()),
                per_channel=params.per_channel,
                reduce_range=params.reduce_range,
                weight_type=QuantType[_TYPES[params.precision]],
                nodes_to_quantize=work.chosen,
                nodes_to_exclude=work.without,
                use_external_data_format=True,
                extra_options=_options(params),
            )
        _finish(work, made, params, ctx)
    ctx.facts["activation_type"] = "uint8"


def static(model: Artifact, params: StaticParams, ctx: PassContext) -> None:
    """Weights to integers, and activations by the ranges that calibration finds.

    Raises:
        ConfigError: calibration data that does not fit the graph.
        PassFailed: nothing to quantise, a name that the graph does not have, NaN, or the quantiser failed.
    """
    import onnx

    with _prepared(model, params, ctx) as work:
        kinds = _operators(params, work)
        light = onnx.load(work.path, load_external_data=False)
        names = ranges.tensors(light, kinds, work.chosen, work.without)
        if not names:
            raise _nothing(work.source, kinds)
        rows = feeds.read(work.source, model.path, params, ctx)
        found = ranges.collect(work.path, names, rows, how_of(params), ctx.progress)
        _leave_empty(light, kinds, set(names) - found.keys(), work, ctx)
        made = work.folder / "quantised.onnx"
        ctx.progress.start("quantise")
        with _quantiser(made):
            _quantise(work, kinds, light, found, params, made)
        ctx.progress.finish()
        _finish(work, made, params, ctx)
    ctx.facts |= {"activation_type": params.activation_type, "quant_format": params.quant_format}
    ctx.facts |= {"calibrate_method": params.calibrate_method, "activations": len(found)}


def how_of(params: StaticParams) -> ranges.How:
    """How ranges are found."""
    given = params.extra_options
    moving = float(given.get("CalibMovingAverageConstant", 0.01))
    return ranges.How(
        method=params.calibrate_method,
        percentile=float(given.get("CalibPercentile", 99.999)),
        moving=moving if given.get("CalibMovingAverage") else None,
        symmetric=bool(given.get("CalibTensorRangeSymmetric", False)),
        providers=params.calibration_providers or ("CPUExecutionProvider",),
    )


@contextmanager
def _prepared(model: Artifact, params: IntegerParams, ctx: PassContext) -> Iterator[_Work]:
    """The graph in a folder of its own, where the quantiser may write."""
    graph = open_graph(model)
    nodes = dict.fromkeys(node.name for node in graph.graph.node)
    chosen = named(params.nodes_to_quantize or (), nodes, "node", graph)
    without = named(params.nodes_to_exclude or (), nodes, "node", graph)
    kinds = dict.fromkeys(node.op_type for node in graph.graph.node)
    named(params.op_types_to_quantize or (), kinds, "operator", graph)
    with TemporaryDirectory(prefix="olive-", dir=ctx.out.parent) as name:
        folder = Path(name)
        ready = Graph(graph.path)
        if params.extra_options.get("BlockSize"):
            ready.raise_opset(_NATIVE)
        copy = ready.save(folder, "source.onnx")
        lists = (params.op_types_to_quantize, params.op_types_to_exclude)
        bound = any((*lists, chosen, without))
        path, notes = preprocess.prepare(copy, folder, optimise=params.quant_preprocess, named=bound)
        for note in notes:
            ctx.progress.note(note)
        kinds_left, more = _left(path, params)
        plain = model.kind is Kind.ONNX
        yield _Work(graph, ready.opset, path, folder, plain, kinds_left, chosen, without + more)


def _left(path: Path, params: IntegerParams) -> tuple[tuple[str, ...], list[str]]:
    """Types of the standard operators, and names of the nodes that stay by their type."""
    import onnx

    without: list[str] = []
    types = set(params.op_types_to_exclude or ()) if params.op_types_to_quantize is None else set[str]()
    kinds: dict[str, None] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type in types:
            without.append(node.name)
        elif node.domain in ("", "ai.onnx") and node.op_type not in _NEVER:
            kinds[node.op_type] = None
    return tuple(kinds), without


def _operators(params: StaticParams, work: _Work) -> list[str]:
    """Types of operators to quantise."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    if params.op_types_to_quantize is not None:
        return list(params.op_types_to_quantize)
    if params.quant_format == "QDQ" and params.prepare_qdq_config:
        return list(work.kinds)
    known = QDQRegistry if params.quant_format == "QDQ" else QLinearOpsRegistry
    return sorted({*known, *QLinearOpsRegistry} - _NEVER)


def _options(params: IntegerParams) -> dict[str, Any]:
    made = dict(params.extra_options)
    made["ActivationSymmetric"] = params.activation_symmetric
    if params.weight_symmetric is not None:
        made["WeightSymmetric"] = params.weight_symmetric
    return made


def _leave_empty(
    light: ModelProto, kinds: Iterable[str], empty: set[str], work: _Work, ctx: PassContext
) -> None:
    """Nodes on values that are always empty, such as the cache before the first token, stay as they are."""
    left = [
        node.name
        for node in light.graph.node
        if node.op_type in kinds and node.name not in work.without and empty & {*node.input, *node.output}
    ]
    if left:
        work.without.extend(left)
        ctx.progress.note(
            f"{len(left)} nodes have values that calibration leaves empty; they stay: {left[0]} ..."
        )


def _quantise(
    work: _Work,
    kinds: list[str],
    light: ModelProto,
    found: dict[str, ranges.Range],
    params: StaticParams,
    made: Path,
) -> None:
    import numpy as np
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, load_model_with_shape_infer

    qdq, options = params.quant_format == "QDQ", _options(params)
    full = qdq and params.prepare_qdq_config
    if full:
        options.setdefault("ForceQuantizeNoInputCheck", True)
    if params.min_real_range is not None:
        options["MinimumRealRange"] = params.min_real_range
    own = params.tensor_quant_overrides or options.get("TensorQuantOverrides") or {}
    options["TensorQuantOverrides"] = _overrides(own)
    wide = {params.precision, params.activation_type} - {"int8", "uint8"}
    if qdq and work.opset < _NATIVE and (wide or _wide(own)):
        options.setdefault("UseQDQContribOps", True)
    types = _float_types(light)
    data = {
        name: TensorData(lowest=np.array(low, types[name]), highest=np.array(high, types[name]))
        for name, (low, high) in found.items()
    }
    tensors = TensorsData(CalibrationMethod[params.calibrate_method], data)
    model = load_model_with_shape_infer(work.path)
    weight, activation = QuantType[_TYPES[params.precision]], QuantType[_TYPES[params.activation_type]]
    rest = (tensors, work.chosen, work.without, kinds, options)
    if qdq:
        made_by: Any = QDQQuantizer(model, params.per_channel, params.reduce_range, weight, activation, *rest)
    else:
        mode = QuantizationMode.QLinearOps
        made_by = ONNXQuantizer(
            model, params.per_channel, params.reduce_range, mode, True, weight, activation, *rest
        )
    made_by.quantize_model()
    made_by.model.save_model_to_file(str(made), True)


def _float_types(model: ModelProto) -> dict[str, type[np.floating[Any]]]:
    import numpy as np

    typed = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    of: dict[int, type[np.floating[Any]]] = {1: np.float32, 10: np.float16}
    kinds = ((one.name, one.type.tensor_type.elem_type) for one in typed)
    return {name: of[kind] for name, kind in kinds if kind in of}


def _overrides(given: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """As the quantiser takes them."""
    from onnxruntime.quantization import QuantType

    def one(entry: dict[str, Any]) -> dict[str, Any]:
        made = dict(entry)
        if "quant_type" in made:
            kind = str(made["quant_type"])
            try:
                made["quant_type"] = QuantType[_TYPES.get(kind.lower(), kind)]
            except KeyError as error:
                raise PassFailed(
                    f"tensor_quant_overrides has quant_type {kind!r}", fix=f"Use one of {', '.join(_TYPES)}."
                ) from error
        if "convert" in made:
            made["convert"] = one(made["convert"])
        return made

    return {name: [one(entry) for entry in entries] for name, entries in given.items()}


def _wide(given: dict[str, list[dict[str, Any]]]) -> bool:
    text = str(given).lower()
    return "int16" in text or "int4" in text


@contextmanager
def _quantiser(made: Path) -> Iterator[None]:
    """Keep what onnxruntime's quantiser says, and tell it when it fails."""
    said = ""
    try:
        with captured() as out:
            try:
                yield
            finally:
                said = out.tail(3)
    except (PassFailed, OSError, MemoryError):
        raise
    except Exception as error:  # it raises what Python raises
        raise PassFailed(
            f"onnxruntime's quantiser failed: {type(error).__name__}: {error}",
            fix=f"Name other op_types_to_quantize, or nodes_to_exclude. It said: {said or 'nothing'}",
        ) from error
    if not made.is_file():
        raise PassFailed(f"onnxruntime's quantiser wrote nothing: {said}")


def _nothing(graph: Graph, kinds: Iterable[str]) -> PassFailed:
    return PassFailed(
        f"{graph.path.name} has nothing to quantise among {', '.join(kinds) or 'its operators'}",
        fix="Look at op_types_to_quantize, nodes_to_quantize, nodes_to_exclude and the model's precision.",
    )


def _precision(params: IntegerParams, plain: bool) -> str:
    """What gates judge by: the fewest bits; they know 16 bits of plain graphs alone."""
    kinds = {params.precision, getattr(params, "activation_type", "uint8")}
    if kinds & {"int4", "uint4"}:
        return "int4"
    return "int16" if plain and kinds <= {"int16", "uint16"} else "int8"


def _finish(work: _Work, made: Path, params: IntegerParams, ctx: PassContext) -> None:
    """Write the result, with what else is in the model's folder, and say how far its weights are."""
    before, after = Graph(work.path), Graph(made)
    added = {node.op_type for node in after.graph.node} - {node.op_type for node in before.graph.node}
    if not added:
        raise _nothing(work.source, params.op_types_to_quantize or work.kinds)
    for place in reversed(range(len(after.model.metadata_props))):
        if after.model.metadata_props[place].key == _MARK:
            del after.model.metadata_props[place]
    ctx.facts["layers"] = table(before, after)
    after.drop_unused()
    after.save(ctx.out, work.source.path.name)
    work.source.copy_rest(ctx.out)
    ctx.attributes.update(
        precision=_precision(params, work.plain), execution_provider=ctx.target.execution_provider
    )
    ctx.facts["precision"] = params.precision
