"""Before quantisation: types and shapes of all values, and constants folded.

As onnxruntime's ``quant_pre_process``, without its copies of the model: inference looks at the graph alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from olive.errors import PassFailed
from olive.passes.export.quiet import captured
from olive.passes.onnx.integer_params import OLDEST

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

_JOINED = "MatMulAddFusion"  # makes a Gemm of them
_FOLDED = "ConstantFolding"
_LARGE = 1 << 20  # bytes of a weight that is not stored twice


def prepare(path: Path, folder: Path, *, optimise: bool, named: bool) -> tuple[Path, list[str]]:
    """Write a graph that is ready to be quantised.

    Args:
        path: of the graph.
        folder: where to write it.
        optimise: fold constants and join nodes as onnxruntime does at any run.
        named: whether the document names nodes or operators, which then keep their names.

    Returns:
        the graph's path, and what could not be done.

    Raises:
        PassFailed: its operators are too old.
    """
    import onnx

    notes: list[str] = []
    model = onnx.load(path, load_external_data=False)
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=1)
    if opset < OLDEST:
        raise PassFailed(
            f"{path.name} has operators of version {opset}; integers need {OLDEST} and later",
            fix="Export the model again with a later opset.",
        )
    if optimise:
        if not _infer(model):
            notes.append("symbolic shapes could not be told; values of unknown type stay in floating point")
        path.write_bytes(model.SerializeToString())
        without = [*([_JOINED] if named else []), *([_FOLDED] if _turned(model) else [])]
        made = _optimised(path, folder, without)
        if made is None:
            notes.append("onnxruntime could not fold constants; the graph is quantised as it is")
        else:
            path, model = made, onnx.load(made, load_external_data=False)
            _infer(model)
    _tell_shapes(model)
    taken = {node.name for node in model.graph.node}
    for number, node in enumerate(model.graph.node):
        if not node.name:
            node.name = _free(f"{node.op_type}_{number}", taken)
    path.write_bytes(model.SerializeToString())
    return path, notes


def _turned(model: ModelProto) -> bool:
    """Whether a large weight is read as it is and turned, as an embedding that is also the head."""
    from olive.passes.onnx.stored import byte_count

    large = {one.name for one in model.graph.initializer if byte_count(one) >= _LARGE}
    turned = {name for node in model.graph.node if node.op_type == "Transpose" for name in node.input}
    straight = {name for node in model.graph.node if node.op_type != "Transpose" for name in node.input}
    return bool(large & turned & straight)


def _free(wanted: str, taken: set[str]) -> str:
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted


def _add(model: ModelProto, found: Iterable[ValueInfoProto]) -> None:
    known = {one.name for one in (*model.graph.value_info, *model.graph.output, *model.graph.input)}
    for one in found:
        if one.name not in known and one.type.tensor_type.elem_type:
            model.graph.value_info.add().CopyFrom(one)


def _tell_shapes(model: ModelProto) -> None:
    """Add what ONNX infers; shapes that contradict it, which some exporters write, are forgotten."""
    from onnx.shape_inference import InferenceError, infer_shapes

    try:
        found = infer_shapes(model)
    except InferenceError:
        for one in model.graph.value_info:
            one.type.tensor_type.ClearField("shape")
        try:
            found = infer_shapes(model)
        except InferenceError as error:
            raise PassFailed(
                f"the graph contradicts itself: {error}", fix="Export the model again."
            ) from error
    _add(model, found.graph.value_info)


def _infer(model: ModelProto) -> bool:
    """Add what symbolic inference finds, which knows onnxruntime's own operators too.

    Its public function leaves a file in the working directory when it does not find everything.
    """
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    log = logging.getLogger("onnxruntime.tools.symbolic_shape_infer")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with captured():
            inference = SymbolicShapeInference(2**31 - 1, True, False, 0)
            inference._preprocess(model)
            while inference.run_:
                complete = inference._infer_impl()
            inference._update_output_from_vi()
    except Exception:  # noqa: BLE001 - it fails in many ways on operators that it does not know
        return False
    finally:
        log.setLevel(level)
    _add(model, inference.out_mp_.graph.value_info)
    return bool(complete)


def _optimised(path: Path, folder: Path, without: list[str]) -> Path | None:
    """The graph after onnxruntime's basic optimisations, its weights in a file beside it."""
    import onnxruntime

    made = folder / "optimised.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(made)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "optimised.onnx.data"
    )
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
    )
    try:
        with captured():
            onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=without
            )
    except Exception:  # noqa: BLE001 - onnxruntime has no common base of its errors
        return None
    return made if made.is_file() else None
