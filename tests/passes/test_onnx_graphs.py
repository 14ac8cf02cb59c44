"""A graph whose weights stay on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from olive.errors import ConfigError, PassFailed
from olive.passes.onnx.graphs import Graph, Stored, graph_file

FLOAT = TensorProto.FLOAT
DRAW = np.random.default_rng(4)
WEIGHT = DRAW.normal(size=(8, 8)).astype(np.float32)
CONSTANT = DRAW.normal(size=(8, 8)).astype(np.float32)
INNER = DRAW.normal(size=8).astype(np.float32)


def outside(name: str, value: np.ndarray, offset: int) -> TensorProto:
    tensor = numpy_helper.from_array(value, name)
    set_external_data(tensor, "w.bin", offset, value.nbytes)
    tensor.ClearField("raw_data")
    return tensor


def source(folder: Path) -> Path:
    """A weight, a constant and a subgraph's weight, all in w.bin; weights listed as inputs; a dead node."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["b", "inner"], ["out"])],
        "then",
        [],
        [helper.make_tensor_value_info("out", FLOAT, None)],
        [outside("inner", INNER, 512)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", FLOAT, None)],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=outside("", CONSTANT, 256)),
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("MatMul", ["a", "c"], ["b"], "second"),
        helper.make_node("Add", ["a", "dead"], ["nowhere"], "useless"),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", 8]),
            helper.make_tensor_value_info("yes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", FLOAT, [8, 8]),
            helper.make_tensor_value_info("dead", FLOAT, [8]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [outside("w", WEIGHT, 0), numpy_helper.from_array(INNER, "dead")],
    )
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx"
    )
    (folder / "w.bin").write_bytes(WEIGHT.tobytes() + CONSTANT.tobytes() + INNER.tobytes())
    return folder


def answer(folder: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    given = {"x": np.ones((2, 8), np.float32), "yes": np.array(True)}
    return np.asarray(session.run(None, given)[0])


def test_what_is_written_computes_the_same(tmp_path: Path) -> None:
    graph = Graph(graph_file(source(tmp_path / "a")))
    assert list(graph.weights) == ["w", "dead", "c"]
    assert not graph.weights["c"].raw_data
    np.testing.assert_array_equal(graph.array("c"), CONSTANT)
    graph.drop_unused()
    assert list(graph.weights) == ["w", "c"]
    assert [one.name for one in graph.graph.input] == ["x", "yes", "w"]
    assert [node.op_type for node in graph.graph.node] == ["MatMul", "MatMul", "If"]
    out = tmp_path / "b"
    out.mkdir()
    graph.save(out)
    graph.copy_rest(out)
    assert {path.name for path in out.iterdir()} <= {"m.onnx", "m.onnx.data"}
    want = np.ones((2, 8), np.float32) @ WEIGHT @ CONSTANT + INNER
    np.testing.assert_allclose(answer(out), want, atol=1e-4)


def test_a_weight_made_of_the_one_it_replaces(tmp_path: Path) -> None:
    graph = Graph(graph_file(source(tmp_path / "a")))
    graph.put(("w",), lambda: (Stored(2 * graph.read("w"), FLOAT, (8, 8)),))
    np.testing.assert_array_equal(graph.array("w"), 2 * WEIGHT)
    graph.raise_opset(17)
    out = tmp_path / "b"
    out.mkdir()
    graph.save(out)
    graph.copy_rest(out)
    assert not (out / "w.bin").exists()
    np.testing.assert_array_equal(Graph(out / "m.onnx").array("w"), 2 * WEIGHT)


def test_a_higher_opset_leaves_weights_on_disk(tmp_path: Path) -> None:
    graph = Graph(graph_file(source(tmp_path / "a")))
    graph.raise_opset(21)
    assert graph.opset == 21
    assert not graph.weights["w"].raw_data
    out = tmp_path / "b"
    out.mkdir()
    graph.save(out)
    want = np.ones((2, 8), np.float32) @ WEIGHT @ CONSTANT + INNER
    np.testing.assert_allclose(answer(out), want, atol=1e-4)


def test_integers_of_four_bits_are_their_bytes_however_they_are_stored(tmp_path: Path) -> None:
    values = np.array([1, -2, 7, -8, 5])
    raw = helper.make_tensor("raw", TensorProto.INT4, [5], bytes([0xE1, 0x87, 0x05]), raw=True)
    listed = helper.make_tensor("listed", TensorProto.INT4, [5], values.tolist())
    assert listed.int32_data
    graph = helper.make_graph([], "g", [], [], [raw, listed])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph), path)
    found = Graph(path)
    assert found.array("raw").tolist() == found.array("listed").tolist() == [0xE1, 0x87, 0x05]


def test_what_is_no_model_or_does_not_say_where_its_weights_are(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "offset":
            entry.value = "zero"
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="no place of w"):
        Graph(folder / "m.onnx")
    (folder / "m.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match="no ONNX model"):
        Graph(folder / "m.onnx")
    (folder / "n.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"m.onnx, n.onnx"):
        graph_file(folder)


def test_a_weight_of_a_subgraph_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "a")
    (folder / "w.bin").write_bytes((folder / "w.bin").read_bytes()[:-4])
    with pytest.raises(PassFailed, match="inner needs 32 bytes from 512"):
        Graph(folder / "m.onnx")
