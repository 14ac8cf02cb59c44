"""MatMulNBits as DequantizeLinear and MatMul: the same integers, the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny
from adapter_kit import context
from olive.config.gates import BundleGate, ParityGate
from olive.engine.gates import bundle, parity
from olive.errors import PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.onnx.graphs import Graph, graph_file
from onnx_kit import graph, run, save

NAME, MAKES = "MatMulNBitsToQDQ", "OnnxKQuantQuantization"
RTN = "OnnxBlockWiseRtnQuantization"


def results(folder: Path, given: dict[str, Any], names: list[str], *, optimised: bool) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    # else the runtime makes MatMulNBits of both nodes again, with inputs rounded to 8 bits
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return list(session.run(names, given))


def integers(found: Graph, name: str) -> np.ndarray:
    tensor = found.weights[name]
    array = numpy_helper.to_array(
        onnx.TensorProto(
            data_type=tensor.data_type,
            dims=tensor.dims,
            raw_data=np.ascontiguousarray(found.array(name)).tobytes(),
        )
    )
    return array.astype(int) if array.dtype.itemsize == 1 else array


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("maker", "bits", "block", "inputs", "dtype"),
    [
        (MAKES, 4, 32, 96, np.float32),
        (MAKES, 8, 16, 100, np.float32),
        (MAKES, 4, 128, 96, np.float32),
        (RTN, 4, 32, 100, np.float16),
        (RTN, 8, 64, 96, np.float32),
    ],
)
def test_integers_and_outputs_stay(
    tmp_path: Path,
    maker: str,
    bits: int,
    block: int,
    inputs: int,
    dtype: Any,
    signed: bool,
    across: bool,
    optimised: bool,
) -> None:
    source = run(
        maker, graph(tmp_path / "g", inputs=inputs, dtype=dtype), tmp_path / "q", bits=bits, block_size=block
    ).out
    ctx = run(NAME, source, tmp_path / "ours", use_signed_int=signed, use_transpose_op=across)
    before, after = Graph(source / "model.onnx"), Graph(ctx.out / "model.onnx")
    assert after.opset == 21
    assert sum(node.op_type == "DequantizeLinear" for node in after.model.graph.node) == 2  # one is shared
    given = {"ids": np.array([3, 49, 0])}
    x, a, y = results(source, given, ["x", "a", "y"], optimised=True)
    x2, a2, y2 = results(ctx.out, given, ["x", "a", "y"], optimised=optimised)
    np.testing.assert_array_equal(x, x2)
    loose = {"atol": 2e-2, "rtol": 5e-3} if dtype is np.float16 else {"atol": 1e-4, "rtol": 1e-5}
    np.testing.assert_allclose(a2, a, **loose)
    np.testing.assert_allclose(y2, y, **{name: 40 * value for name, value in loose.items()})
    packed = before.array(f"shared_Q{bits}").reshape(40, -1)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(40, -1) if bits == 4 else packed
    got = integers(after, f"shared_DQ_Q{bits}") + (2 ** (bits - 1) if signed else 0)
    np.testing.assert_array_equal(got if across else got.T, codes[:, :inputs])
    scales = after.array("shared_DQ_scales")
    want = before.array("shared_scales")
    np.testing.assert_array_equal(
        scales.reshape(want.shape) if across or want.shape[1] == 1 else scales.T, want
    )
    has_zeros = "shared_DQ_zero_points" in after.weights
    assert has_zeros == (not signed or maker == MAKES)


def test_zero_points_only_where_they_say_something(tmp_path: Path) -> None:
    source = run(RTN, graph(tmp_path / "g"), tmp_path / "q", block_size=32).out
    for number, (params, count) in enumerate(
        [({"use_int4": True}, 0), ({"use_int4": True, "add_zero_point": True}, 2), ({}, 2)]
    ):
        found = Graph(run(NAME, source, tmp_path / str(number), **params).out / "model.onnx")
        zeros = [name for name in found.weights if name.endswith("zero_points")]
        assert len(zeros) == count
        if zeros:
            assert set(integers(found, zeros[0]).reshape(-1)) == ({0} if params else {8})
        code = TensorProto.INT4 if params else TensorProto.UINT4
        assert found.weights["shared_DQ_Q4"].data_type == code


def test_bias_order_and_nodes_that_stay(tmp_path: Path) -> None:
    draw = np.random.default_rng(8)
    weights = {
        "q": draw.integers(0, 256, (16, 2, 16)).astype(np.uint8),
        "q2": draw.integers(0, 256, (16, 2, 8)).astype(np.uint8),
        "s": draw.normal(size=(16, 2)).astype(np.float32),
        "z": draw.normal(size=(16, 2)).astype(np.float32),
        "b": draw.normal(size=16).astype(np.float32),
        "order": np.arange(64, dtype=np.int32) // 32,
        "turned": 1 - np.arange(64, dtype=np.int32) // 32,
    }
    form = {"domain": "com.microsoft", "K": 64, "N": 16, "block_size": 32}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "q", "s", "", "order", "b"], ["o0"], "whole", bits=4, **form),
        helper.make_node("MatMulNBits", ["x", "q", "s", "", "turned"], ["o1"], "turned", bits=4, **form),
        helper.make_node("MatMulNBits", ["x", "q", "s", "z"], ["o2"], "real", bits=4, **form),
        helper.make_node("MatMulNBits", ["x", "q2", "s"], ["o3"], "two", bits=2, **form),
        helper.make_node("MatMulNBits", ["x", "q", "s"], ["o4"], "told", bits=4, **form),
        helper.make_node(
            "ReduceMean", ["o0"], ["o5"], "mean", axes=[1]
        ),  # axes are an input from opset 18 on
    ]
    outputs = [(f"o{number}", TensorProto.FLOAT, None) for number in range(6)]
    source = save(tmp_path / "g", nodes, [("x", TensorProto.FLOAT, ["n", 64])], outputs, weights)
    ctx = run(NAME, source, tmp_path / "ours", nodes_to_exclude=["told"])
    after = Graph(ctx.out / "model.onnx")
    assert [node.op_type for node in after.model.graph.node] == [
        *("DequantizeLinear", "MatMul", "Add"),
        *["MatMulNBits"] * 4,
        "ReduceMean",
    ]
    assert {row["name"]: row["reason"].split()[-1] for row in ctx.facts["left"]} == {
        "turned": "order",
        "real": "numbers",
        "two": "bits",
        "told": "nodes_to_exclude",
    }
    given = {"x": draw.normal(size=(3, 64)).astype(np.float32)}
    before = results(source, given, ["o0", "o5"], optimised=True)
    for one, other in zip(before, results(ctx.out, given, ["o0", "o5"], optimised=False), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)
    with pytest.raises(PassFailed, match="no MatMulNBits"):
        run(NAME, graph(tmp_path / "float"), tmp_path / "b")


def test_a_bundle_stays_one_and_passes_its_gates(tmp_path: Path) -> None:
    source = tiny.tiny_phi3(tmp_path / "hf", hidden=128, initializer_range=0.2, tie_word_embeddings=False)
    exported = context(tmp_path / "export")
    ModelBuilder().run(
        Artifact(kind=Kind.HF, path=source, digest="0" * 64),
        ModelBuilder.Params.model_validate({"precision": "int4"}),
        exported,
    )
    ctx = run(NAME, exported.out, tmp_path / "ours", Kind.GENAI)
    assert not any(n.op_type == "MatMulNBits" for n in Graph(graph_file(ctx.out)).model.graph.node)
    before = Artifact(kind=Kind.GENAI, path=exported.out, digest="0" * 64)
    prompts = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]
    found = parity.check(before, ctx.out, ParityGate(), ctx, prompts)
    assert found.figures["kl"] < 1e-3  # inputs are rounded to 8 bits in both or in one of them
    assert bundle.check(before, ctx.out, BundleGate(), ctx, prompts).figures["tokens"] > 0
