"""Small ONNX graphs, and running one pass on a folder that holds one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, TensorProto, helper, numpy_helper

from adapter_kit import context
from olive.config.workflow import Accelerator, DataConfig
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.registry import resolve
from training_kit import Notes

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def save(
    folder: Path,
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    weights: dict[str, np.ndarray],
    *,
    opset: int = 17,
    outside: bool = True,
    infer: bool = True,
) -> Path:
    """Write ``model.onnx``; ``outside``: each weight in a file of its own."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *one) for name, one in inputs.items()],
        [helper.make_tensor_value_info(name, *one) for name, one in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=imports, ir_version=10)
    if infer:
        model = onnx.shape_inference.infer_shapes(model)
    folder.mkdir(parents=True)
    onnx.save(
        model,
        folder / "model.onnx",
        save_as_external_data=outside,
        all_tensors_to_one_file=False,
        size_threshold=100,
    )
    return folder


def mlp(folder: Path, *, head: float = 1.0, **more: Any) -> Path:
    """x (n, 16) -> MatMul, Add, Relu -> MatMul -> y (n, 8); ``head`` scales the last weight."""
    draw = np.random.default_rng(5)
    weights = {
        "first": draw.normal(size=(16, 32)).astype("float32"),
        "bias": draw.normal(size=32).astype("float32"),
        "last": (draw.normal(size=(32, 8)) * head).astype("float32"),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], "one"),
        helper.make_node("Add", ["a", "bias"], ["b"], "plus"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "last"], ["y"], "two"),
    ]
    return save(folder, nodes, {"x": (FLOAT, ["n", 16])}, {"y": (FLOAT, ["n", 8])}, weights, **more)


def transformer(folder: Path, *, vocabulary: int = 40, width: int = 32, heads: int = 4, **more: Any) -> Path:
    """An encoder layer: input_ids, attention_mask (1, n) -> y (1, n, width)."""
    draw = np.random.default_rng(9)
    size = width // heads

    def weight(*shape: int) -> np.ndarray:
        return (draw.normal(size=shape) / np.sqrt(shape[0])).astype("float32")

    weights = {name: weight(width, width) for name in ("wq", "wk", "wv", "wo")}
    weights |= {"table": weight(vocabulary, width) * 4, "up": weight(width, 2 * width)}
    weights |= {"down": weight(2 * width, width), "scale": np.ones(width, "float32")}
    weights |= {"split": np.array([1, -1, heads, size]), "join": np.array([1, -1, width])}
    weights |= {"root": np.array(size**-0.5, "float32"), "one": np.array(1.0, "float32")}
    weights |= {"far": np.array(-1e4, "float32"), "axes": np.array([1, 2])}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"], "embed"),
        helper.make_node("LayerNormalization", ["x", "scale"], ["n"], "norm"),
        helper.make_node("Cast", ["attention_mask"], ["m1"], "cast", to=FLOAT),
        helper.make_node("Sub", ["one", "m1"], ["m2"], "sub"),
        helper.make_node("Mul", ["m2", "far"], ["m3"], "far_away"),
        helper.make_node("Unsqueeze", ["m3", "axes"], ["mask"], "unsqueeze"),
    ]
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            helper.make_node("MatMul", ["n", f"w{part}"], [f"{part}1"], f"{part}_proj"),
            helper.make_node("Reshape", [f"{part}1", "split"], [f"{part}2"], f"{part}_split"),
            helper.make_node("Transpose", [f"{part}2"], [f"{part}3"], f"{part}_turn", perm=order),
        ]
    nodes += [
        helper.make_node("MatMul", ["q3", "k3"], ["s1"], "scores"),
        helper.make_node("Mul", ["s1", "root"], ["s2"], "rooted"),
        helper.make_node("Add", ["s2", "mask"], ["s3"], "masked"),
        helper.make_node("Softmax", ["s3"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v3"], ["c1"], "context"),
        helper.make_node("Transpose", ["c1"], ["c2"], "back", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["c2", "join"], ["c3"], "joined"),
        helper.make_node("MatMul", ["c3", "wo"], ["o"], "o_proj"),
        helper.make_node("Add", ["x", "o"], ["r"], "residual"),
        helper.make_node("MatMul", ["r", "up"], ["u"], "up_proj"),
        helper.make_node("Sigmoid", ["u"], ["g"], "sigmoid"),
        helper.make_node("Mul", ["u", "g"], ["h"], "gated"),
        helper.make_node("MatMul", ["h", "down"], ["y"], "down_proj"),
    ]
    inputs = dict.fromkeys(("input_ids", "attention_mask"), (INT64, [1, "n"]))
    return save(folder, nodes, inputs, {"y": (FLOAT, [1, "n", width])}, weights, **more)


def run(
    name: str,
    folder: Path,
    scratch: Path,
    *,
    kind: Kind = Kind.ONNX,
    provider: str = "CPUExecutionProvider",
    data: dict[str, DataConfig] | None = None,
    **params: Any,
) -> PassContext:
    """Run a pass on the model in ``folder``."""
    technique = resolve(name)
    ctx = context(scratch)
    ctx.data, ctx.progress = data or {}, Notes()
    ctx.target = Accelerator(execution_providers=(provider,))
    given = Artifact(kind=kind, path=folder, digest="0" * 64)
    technique().run(given, technique.Params.model_validate(params), ctx)
    technique().ensure(ctx.out, kind)
    return ctx


def model_of(folder: Path) -> onnx.ModelProto:
    """With its weights; valid by ONNX's own checker where all operators are standard."""
    return onnx.load(folder / "model.onnx")


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in model_of(folder).graph.initializer}


def outputs_of(folder: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime computes on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def rows(folder: Path, made: Sequence[dict[str, Any]], name: str = "calibration") -> dict[str, DataConfig]:
    """A data config of JSON Lines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    config = {
        "name": name,
        "type": "HuggingfaceContainer",
        "load_dataset_config": {"data_name": "json", "data_files": str(path), "split": "train"},
    }
    return {name: DataConfig.model_validate(config)}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(
        np.linalg.norm(found.astype("float64") - wanted.astype("float64"))
        / np.linalg.norm(wanted.astype("float64"))
    )
