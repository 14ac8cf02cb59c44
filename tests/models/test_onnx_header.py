"""The header of an ONNX file against what onnx reads of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from olive.errors import ConfigError, UntrustedInput
from olive.models.graph import describe_graph
from olive.models.onnx_header import DTYPES, read_graph


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def sample() -> onnx.ModelProto:
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "inner",
        [],
        [helper.make_tensor_value_info("d", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.ones(2, np.float32), "c")],
    )
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
            helper.make_node("If", ["flag"], ["z"], "choice", then_branch=inner, else_branch=inner),
        ],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", None, 4]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT16, [4, 3]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(np.ones((4, 3), np.float16), "w")],
    )


def save(path: Path) -> None:
    onnx.save(sample(), path, save_as_external_data=True, location="w.bin", size_threshold=0)


def test_the_graph_is_what_onnx_reads(tmp_path: Path) -> None:
    onnx.save(
        sample(), tmp_path / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = describe_graph(tmp_path, "model.onnx").graph
    assert found is not None
    assert [(n.name, n.op_type, n.inputs, n.outputs) for n in found.nodes] == [
        ("product", "MatMul", ("x", "w"), ("y",)),
        ("choice", "If", ("flag",), ("z",)),
    ]
    assert found.tensors == {"w": ("F16", (4, 3))}
    assert [(v.name, v.dtype, v.shape) for v in found.inputs] == [
        ("x", "F16", ("batch", None, 4)),
        ("flag", "BOOL", ()),
    ]
    assert found.outputs[0].shape is None
    assert found.opsets == {"": 17, "com.microsoft": 1}
    assert found.files == ("w.bin",)


def test_every_dtype_of_onnx_has_its_name() -> None:
    known = {number for name, number in TensorProto.DataType.items() if name != "UNDEFINED"}
    assert known <= DTYPES.keys()


_NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(_NAMES, st.lists(st.integers(0, 2**40), max_size=4)), max_size=5), st.data())
def test_any_names_and_sizes(tmp_path: Path, parts: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    weights = []
    for name, dims in parts:
        weight = TensorProto(name=name, data_type=data.draw(st.sampled_from([1, 10, 16, 22])))
        weight.dims.extend(dims)
        weights.append(weight)
    (tmp_path / "m.onnx").write_bytes(model([], [], [], weights).SerializeToString())
    expected = {w.name: (DTYPES[w.data_type], tuple(w.dims)) for w in weights}
    assert read_graph(tmp_path / "m.onnx").tensors == expected


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_damage_is_a_typed_error_or_a_graph(tmp_path: Path, data: st.DataObject) -> None:
    body = bytearray(sample().SerializeToString())
    if data.draw(st.booleans()):
        body = body[: data.draw(st.integers(0, len(body) - 1))]
    else:
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "m.onnx").write_bytes(bytes(body))
    with suppress(ConfigError, UntrustedInput):
        read_graph(tmp_path / "m.onnx")


@pytest.mark.parametrize(("location", "error"), [("../w.bin", UntrustedInput), ("other.bin", ConfigError)])
def test_weights_elsewhere_or_nowhere(tmp_path: Path, location: str, error: type[Exception]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(folder / "m.onnx")
    (tmp_path / "w.bin").write_bytes((folder / "w.bin").read_bytes())
    body = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in body.graph.initializer[0].external_data if e.key == "location").value = location
    (folder / "m.onnx").write_bytes(body.SerializeToString())
    with pytest.raises(error, match="weights"):
        read_graph(folder / "m.onnx")


def test_text_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("a page of the web, not a model\n" * 3)
    with pytest.raises(ConfigError, match="no ONNX model"):
        read_graph(tmp_path / "m.onnx")
