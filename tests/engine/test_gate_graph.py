"""The graph gate: it lets a sound graph through and stops a broken one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from adapter_kit import context
from olive.config.gates import GraphGate
from olive.config.workflow import DataConfig
from olive.engine.gates import graph
from olive.engine.gates.made_up import inputs
from olive.errors import GateFailed, PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.onnx.graphs import Graph
from olive.passes.registry import resolve


def perceptron(folder: Path, scale: float = 1.0, damage: Any = None) -> Artifact:
    """y = relu(x w + b) v, with x (n, 12)."""
    draw = np.random.default_rng(0)
    weights = {
        "w": draw.normal(size=(12, 32)).astype(np.float32) / scale,
        "b": draw.normal(size=32).astype(np.float32),
        "v": draw.normal(size=(32, 5)).astype(np.float32),
    }
    if damage is not None:
        weights["v"][3, 2] = damage
    made = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
            helper.make_node("Add", ["a", "b"], ["c"], "bias"),
            helper.make_node("Relu", ["c"], ["d"], "relu"),
            helper.make_node("MatMul", ["d", "v"], ["y"], "second"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return Artifact(kind=Kind.ONNX, path=folder, digest="0" * 64)


def test_the_same_graph_passes_and_one_changed_weight_does_not(tmp_path: Path) -> None:
    before, ctx = perceptron(tmp_path / "a"), context(tmp_path)
    found = graph.check(before, perceptron(tmp_path / "same").path, GraphGate(), ctx)
    assert found.figures["error"] == 0
    with pytest.raises(GateFailed, match="the output y moved") as failed:
        graph.check(before, perceptron(tmp_path / "moved", damage=9.0).path, GraphGate(), ctx)
    assert failed.value.figures["error"] > failed.value.limits["error"]
    with pytest.raises(GateFailed, match="NaN or infinity"):
        graph.check(before, perceptron(tmp_path / "nan", damage=np.nan).path, GraphGate(), ctx)


def test_a_graph_without_its_output_or_that_does_not_load(tmp_path: Path) -> None:
    before, ctx = perceptron(tmp_path / "a"), context(tmp_path)
    other = perceptron(tmp_path / "b").path
    model = onnx.load(other / "model.onnx")
    model.graph.node[-1].output[0] = model.graph.output[0].name = "z"
    onnx.save(model, other / "model.onnx")
    with pytest.raises(PassFailed, match="no output 'y'"):
        graph.check(before, other, GraphGate(), ctx)
    (other / "model.onnx").write_bytes(b"\x08\x08:\x00")
    with pytest.raises(PassFailed, match="the changed model does not load"):
        graph.check(before, other, GraphGate(), ctx)


def rows(tmp_path: Path, ctx: PassContext, scale: float) -> None:
    draw = np.random.default_rng(5)
    lines = [json.dumps({"x": (scale * draw.normal(size=(2, 12))).tolist()}) for _ in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    load = {"data_name": "json", "data_files": str(tmp_path / "rows.jsonl"), "split": "train"}
    ctx.data = {"rows": DataConfig.model_validate({"name": "rows", "load_dataset_config": load})}


def test_a_pass_with_data_is_held_on_its_data(tmp_path: Path) -> None:
    """Ranges found on inputs of size 0.005 cut inputs of size 1 off."""
    before, ctx = perceptron(tmp_path / "a", scale=0.005), context(tmp_path)
    rows(tmp_path, ctx, 0.005)
    technique = resolve("OnnxStaticQuantization")
    params = technique.Params.model_validate({"data_config": "rows"})
    technique().run(before, params, ctx)
    found = graph.check(before, ctx.out, GraphGate(), ctx)
    assert found.figures["error"] < 0.1
    ctx.data = {}
    with pytest.raises(GateFailed):
        graph.check(before, ctx.out, GraphGate(max_error=0.1), ctx)


def test_made_up_inputs_fit_what_the_graph_declares(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((3, 4), np.float32), "table")
    made = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["y"]),
            helper.make_node("Identity", ["past"], ["z"]),
        ],
        "g",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT32, ["batch", "seq"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT16, ["batch", 2, "past_seq", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [table],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    first, second = (inputs(Graph(tmp_path / "m.onnx"), seed) for seed in (0, 1))
    assert {name: (value.dtype.name, value.shape) for name, value in first.items()} == {
        "ids": ("int32", (2, 8)),
        "attention_mask": ("int64", (2, 8)),
        "past": ("float16", (2, 2, 0, 4)),
        "flag": ("bool", ()),
    }
    assert set(np.unique(np.concatenate([first["ids"], second["ids"]]))) == {0, 1, 2}
    assert not np.array_equal(first["ids"], second["ids"])
