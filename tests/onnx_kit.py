"""Small ONNX graphs with weights beside them, a pass run on one, and what its integers stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from adapter_kit import context
from olive.models.artifact import Artifact, Kind
from olive.passes.onnx.graphs import Graph
from olive.passes.registry import resolve


def graph(folder: Path, *, inputs: int = 96, outputs: int = 40, dtype: Any = np.float32) -> Path:
    """Two products that share a weight, one with its own, and an embedding; weights beside the graph."""
    draw = np.random.default_rng(3)
    code = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    table = draw.normal(size=(50, inputs)).astype(dtype)
    shared = draw.normal(size=(inputs, outputs)).astype(dtype)
    own = draw.normal(size=(outputs, inputs)).astype(dtype)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
        helper.make_node("MatMul", ["x", "shared"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "own"], ["b"], "second"),
        helper.make_node("MatMul", ["b", "shared"], ["y"], "third"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [
            helper.make_tensor_value_info("x", code, ["n", inputs]),
            helper.make_tensor_value_info("a", code, ["n", outputs]),
            helper.make_tensor_value_info("y", code, ["n", outputs]),
        ],
        [
            numpy_helper.from_array(value, name)
            for name, value in (("table", table), ("shared", shared), ("own", own))
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (folder / "note.txt").write_text("kept")
    return folder


def run(name: str, folder: Path, scratch: Path, kind: Kind = Kind.ONNX, **params: Any) -> Any:
    technique = resolve(name)
    ctx = context(scratch)
    given = Artifact(kind=kind, path=folder, digest="0" * 64)
    technique().run(given, technique.Params.model_validate(params), ctx)
    technique().ensure(ctx.out)
    return ctx


def save(
    folder: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]
) -> Path:
    """A model of these nodes; inputs and outputs are (name, element type, shape)."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=8), folder / "model.onnx")
    return folder


def outputs_of(folder: Path, ids: list[int]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"ids": np.array(ids)}), strict=True))


def codes(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    parts = [(packed >> place) & (2**bits - 1) for place in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def expanded(found: Graph, name: str, bits: int, block: int, columns: int) -> np.ndarray:
    """The (outputs, inputs) float64 matrix that the parts of a weight stand for."""
    packed = codes(found.array(f"{name}_Q{bits}"), bits)
    packed = packed.reshape(len(packed), -1).astype(np.float64)
    scales = found.array(f"{name}_scales").astype(np.float64).repeat(block, 1)[:, : packed.shape[1]]
    zeros: Any = float(2 ** (bits - 1))
    if f"{name}_zero_points" in found.weights:
        zeros = codes(found.array(f"{name}_zero_points"), bits).astype(np.float64)
        zeros = zeros.repeat(block, 1)[:, : packed.shape[1]]
    return ((packed - zeros) * scales)[:, :columns]
