"""Weights of ONNX graphs to integers: the numbers, the nodes, the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from olive.passes.onnx.weight_only import Settings
from onnx import TensorProto, helper, numpy_helper

import tiny
from adapter_kit import context
from olive.config.workflow import BundleGate, ParityGate
from olive.engine.gates import bundle, parity
from olive.errors import PassFailed, UntrustedInput
from olive.models.artifact import Artifact, Kind
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.onnx.graphs import Graph, graph_file
from olive.passes.registry import resolve

PASSES = ("OnnxBlockWiseRtnQuantization", "OnnxKQuantQuantization", "OnnxHqqQuantization")


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
    scales = found.array(f"{name}_Q{bits}_scales").astype(np.float64).repeat(block, 1)[:, : packed.shape[1]]
    zeros: Any = float(2 ** (bits - 1))
    if f"{name}_Q{bits}_zero_points" in found.weights:
        zeros = codes(found.array(f"{name}_Q{bits}_zero_points"), bits).astype(np.float64)
        zeros = zeros.repeat(block, 1)[:, : packed.shape[1]]
    return ((packed - zeros) * scales)[:, :columns]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 16), (4, 128)])
def test_rtn_has_the_bits_of_onnxruntime(tmp_path: Path, bits: int, block: int, symmetric: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    source = graph(tmp_path / "source", inputs=128)
    ctx = run(PASSES[0], source, tmp_path / "ours", bits=bits, block_size=block, is_symmetric=symmetric)
    found = Graph(ctx.out / "model.onnx")
    theirs = MatMulNBitsQuantizer(
        onnx.load(source / "model.onnx"),
        algo_config=DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=symmetric, bits=bits, op_types_to_quantize=("MatMul",)
        ),
    )
    theirs.process()
    wanted = {one.name: numpy_helper.to_array(one) for one in theirs.model.graph().initializer}
    for part in ("", "_scales", *(() if symmetric else ("_zero_points",))):
        their_name = f"shared_Q{bits}" if not part else f"shared{part}"
        np.testing.assert_array_equal(
            found.array(f"shared_Q{bits}{part}"),
            wanted[their_name].reshape(found.array(f"shared_Q{bits}{part}").shape),
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("inputs", [96, 100])
@pytest.mark.parametrize("name", PASSES)
def test_the_runtime_multiplies_by_what_the_integers_stand_for(
    tmp_path: Path, name: str, inputs: int, dtype: Any
) -> None:
    source = graph(tmp_path / "source", inputs=inputs, dtype=dtype)
    ctx = run(name, source, tmp_path / "ours", block_size=32)
    found = Graph(ctx.out / "model.onnx")
    got = outputs_of(ctx.out, [3, 49, 0])
    kinds = [node.op_type for node in found.model.graph.node]
    assert kinds[1:] == ["MatMulNBits"] * 3
    x = got["x"].astype(np.float64)
    if kinds[0] == "GatherBlockQuantized":
        want = expanded(found, "table", 4, 32, inputs)[[3, 49, 0]]
        np.testing.assert_allclose(x, want, atol=2e-3 if dtype is np.float16 else 1e-6)
    want = x @ expanded(found, "shared", 4, 32, inputs).T
    loose = 5e-2 if dtype is np.float16 else 1e-4
    np.testing.assert_allclose(got["a"], want, atol=loose, rtol=loose / 10)
    before = outputs_of(source, [3, 49, 0])["a"].astype(np.float64)
    assert 0.001 < np.linalg.norm(got["a"] - before) / np.linalg.norm(before) < 0.25


def test_a_weight_that_is_shared_is_written_once_and_reported_once(tmp_path: Path) -> None:
    ctx = run(PASSES[1], graph(tmp_path / "source"), tmp_path / "ours")
    found = Graph(ctx.out / "model.onnx")
    nodes = {node.name: node for node in found.model.graph.node}
    assert nodes["first_Q4"].input[1] == nodes["third_Q4"].input[1] == "shared_Q4"
    assert [row["name"] for row in ctx.facts["layers"]] == ["first", "second"]
    assert all(0 < row["weight_error"] < 0.02 for row in ctx.facts["layers"])
    assert set(found.weights) == {
        "table",
        *(f"{w}_Q4{part}" for w in ("shared", "own") for part in ("", "_scales", "_zero_points")),
    }
    assert {path.name for path in ctx.out.iterdir()} == {"model.onnx", "model.onnx.data", "note.txt"}


def test_k_quant_leaves_less_error_than_rounding_and_hqq_less_by_its_norm(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    weight = Graph(source / "model.onnx").array("shared").T.astype(np.float64)
    errors = {}
    for name in PASSES:
        extra = {"is_symmetric": False} if name == PASSES[0] else {}
        found = Graph(run(name, source, tmp_path / name, block_size=32, **extra).out / "model.onnx")
        errors[name] = weight - expanded(found, "shared", 4, 32, 96)
    squares = [np.square(errors[name]).sum() for name in PASSES]
    assert squares[1] < 0.95 * squares[0]
    norms = [(np.abs(errors[name]) ** 0.7).sum() for name in PASSES]
    assert norms[2] < norms[1]


def test_nodes_by_name(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    own = {"second": {"bits": 8, "group_size": 16}}
    ctx = run(PASSES[1], source, tmp_path / "a", nodes_to_exclude=["first"], customized_weight_config=own)
    found = Graph(ctx.out / "model.onnx")
    assert [n.name for n in found.model.graph.node] == ["embed", "first", "second_Q8", "third_Q4"]
    np.testing.assert_array_equal(found.array("shared"), Graph(source / "model.onnx").array("shared"))
    with pytest.raises(PassFailed, match="no node 'frist'"):
        run(PASSES[0], source, tmp_path / "b", nodes_to_exclude=["frist"])
    with pytest.raises(PassFailed, match="no product with a weight"):
        run(PASSES[1], ctx.out, tmp_path / "c", nodes_to_exclude=["first"])


def test_weights_outside_of_the_folder_or_cut_short_are_refused(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    model = onnx.load(source / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "../w.bin"
    (tmp_path / "w.bin").write_bytes((source / "w.bin").read_bytes())
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UntrustedInput, match="outside"):
        run(PASSES[0], source, tmp_path / "a")
    source = graph(tmp_path / "short")
    (source / "w.bin").write_bytes((source / "w.bin").read_bytes()[:-4000])
    with pytest.raises(PassFailed, match="shorter"):
        run(PASSES[0], source, tmp_path / "b")


def test_nan_is_named(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    data = bytearray((source / "w.bin").read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (source / "w.bin").write_bytes(data)
    with pytest.raises(PassFailed, match="own has 1 values"):
        run(PASSES[2], source, tmp_path / "a")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny.tiny_phi3(
        tmp_path_factory.mktemp("source"), hidden=128, initializer_range=0.2, tie_word_embeddings=False
    )
    ctx = context(tmp_path_factory.mktemp("export"))
    ModelBuilder().run(
        Artifact(kind=Kind.HF, path=source, digest="0" * 64),
        ModelBuilder.Params.model_validate({"precision": "fp32"}),
        ctx,
    )
    return ctx.out


@pytest.mark.parametrize("name", PASSES)
def test_a_bundle_stays_one_and_passes_its_gates(exported: Path, tmp_path: Path, name: str) -> None:
    ctx = run(name, exported, tmp_path / "q", Kind.GENAI, block_size=32)
    assert ctx.attributes["precision"] == "int4"
    before = Artifact(kind=Kind.GENAI, path=exported, digest="0" * 64)
    prompts = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]
    found = parity.check(before, ctx.out, ParityGate(), ctx, prompts)
    assert 1e-4 < found.figures["kl"] < 1.0
    assert bundle.check(before, ctx.out, BundleGate(), ctx, prompts).figures["tokens"] > 0
    own = json.loads((exported / "genai_config.json").read_text())
    assert json.loads((ctx.out / "genai_config.json").read_text()) == own
    size = [sum(p.stat().st_size for p in graph_file(f).parent.glob("*.data")) for f in (exported, ctx.out)]
    assert size[1] < size[0] / 2


def test_settings_are_those_of_the_operator() -> None:
    assert Settings(4, 32, True).grid.kind == "full_range"
