"""Weights of ONNX graphs to integers: the numbers, the nodes, the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny
from adapter_kit import context
from olive import workflows
from olive.config.gates import BundleGate, ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import bundle, parity
from olive.errors import ConfigError, PassFailed, UntrustedInput
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.graph import describe_graph
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.onnx.graphs import Graph, graph_file
from olive.passes.onnx.weight_only import Settings
from olive.passes.registry import resolve
from onnx_kit import codes, expanded, graph, outputs_of, run, save

PASSES = ("OnnxBlockWiseRtnQuantization", "OnnxKQuantQuantization", "OnnxHqqQuantization")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "block", "inputs", "dtype"),
    [
        (4, 32, 128, np.float32),
        (4, 32, 300, np.float16),
        (4, 128, 128, np.float32),
        (4, 128, 300, np.float32),
        (8, 16, 128, np.float32),
        (8, 64, 100, np.float16),
        (2, 32, 128, np.float16),
        (2, 64, 100, np.float32),
    ],
)
def test_rtn_has_the_bits_of_onnxruntime(
    tmp_path: Path, bits: int, block: int, inputs: int, dtype: Any, symmetric: bool
) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    source = graph(tmp_path / "source", inputs=inputs, dtype=dtype)
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
    for name in (f"shared_Q{bits}", "shared_scales", *(() if symmetric else ("shared_zero_points",))):
        assert found.shape(name) == wanted[name].shape
        np.testing.assert_array_equal(found.array(name).reshape(wanted[name].shape), wanted[name])


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
        *(f"{w}{part}" for w in ("shared", "own") for part in ("_Q4", "_scales", "_zero_points")),
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
    with pytest.raises(PassFailed, match=r"no node 'frist'\n  fix: did you mean `first`"):
        run(PASSES[0], source, tmp_path / "b", nodes_to_exclude=["frist"])
    with pytest.raises(PassFailed, match=r"no node 'thrid'\n  fix: did you mean `third`"):
        run(PASSES[1], source, tmp_path / "d", customized_weight_config={"thrid": {"bits": 8}})
    with pytest.raises(PassFailed, match="'embed' is no MatMul or Gemm"):
        run(PASSES[2], source, tmp_path / "e", nodes_to_include=["embed"])
    ctx_of_one = run(PASSES[0], source, tmp_path / "f", nodes_to_include=["embed"])
    assert [row["name"] for row in ctx_of_one.facts["layers"]] == ["embed"]
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


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_its_bias_and_nothing_else_about_it(tmp_path: Path, transposed: int) -> None:
    draw = np.random.default_rng(5)
    weight = draw.normal(size=(96, 24)).astype(np.float32)
    bias = draw.normal(size=24).astype(np.float32)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    source = save(
        tmp_path / "source",
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["y"], "dense", transB=transposed),
            helper.make_node("Gemm", ["x", "w", "b"], ["z"], "halved", transB=transposed, alpha=0.5),
        ],
        [("x", TensorProto.FLOAT, ["n", 96])],
        [("y", TensorProto.FLOAT, ["n", 24]), ("z", TensorProto.FLOAT, ["n", 24])],
        {"w": stored, "b": bias},
    )
    ctx = run(PASSES[1], source, tmp_path / "ours")
    found = Graph(ctx.out / "model.onnx")
    assert [n.op_type for n in found.model.graph.node] == ["MatMulNBits", "Add", "Gemm"]
    x = draw.normal(size=(5, 96)).astype(np.float32)
    session = onnxruntime.InferenceSession(ctx.out / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(["y"], {"x": x})[0]
    want = x.astype(np.float64) @ expanded(found, "w", 4, 32, 96).T + bias
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(found.array("w"), stored)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block", "width"), [(4, 16, 96), (4, 32, 100), (8, 64, 101), (2, 128, 100)])
def test_the_runtime_looks_up_what_the_integers_stand_for(
    tmp_path: Path, bits: int, block: int, width: int, symmetric: bool
) -> None:
    """Every block with every number of bits is tried here or in the test of products."""
    source = graph(tmp_path / "source", inputs=width)
    ctx = run(PASSES[0], source, tmp_path / "ours", bits=bits, block_size=block, is_symmetric=symmetric)
    found = Graph(ctx.out / "model.onnx")
    assert found.model.graph.node[0].op_type == "GatherBlockQuantized"
    want = expanded(found, "table", bits, block, width)[[7, 0, 49]]
    np.testing.assert_allclose(outputs_of(ctx.out, [7, 0, 49])["x"], want, atol=1e-6)


@pytest.mark.parametrize("width", [96, 80])
def test_a_table_that_is_also_the_head_is_quantised_once(tmp_path: Path, width: int) -> None:
    """As ModelBuilder writes tied weights: turned by a Transpose for the look-up."""
    head = np.random.default_rng(9).normal(size=(width, 50)).astype(np.float32)
    source = save(
        tmp_path / "source",
        [
            helper.make_node("Transpose", ["head"], ["table"], "turn", perm=[1, 0]),
            helper.make_node("Gather", ["table", "ids"], ["x"], "embed"),
            helper.make_node("MatMul", ["x", "head"], ["y"], "lm_head"),
            helper.make_node("Transpose", ["table"], ["again"], "back", perm=[0, 1]),
            helper.make_node("MatMul", ["again", "head"], ["z"], "other"),
        ],
        [("ids", TensorProto.INT64, ["n"])],
        [("x", TensorProto.FLOAT, None), ("y", TensorProto.FLOAT, None)],
        {"head": head},
    )
    found = Graph(run(PASSES[0], source, tmp_path / "ours", block_size=32).out / "model.onnx")
    kinds = [node.op_type for node in found.model.graph.node]
    once = width % 32 == 0
    assert kinds == [*(["Reshape"] if once else []), "GatherBlockQuantized", "MatMulNBits"]
    integers = {name for name in found.weights if "_Q4" in name and not name.endswith(("shape", "scales"))}
    assert len(integers) == (1 if once else 2)
    got = outputs_of(tmp_path / "ours" / "out", [7, 0, 49])
    whole = expanded(found, "head", 4, 32, width)
    np.testing.assert_allclose(got["x"], whole[[7, 0, 49]], atol=1e-6)
    np.testing.assert_allclose(got["y"], got["x"].astype(np.float64) @ whole.T, atol=1e-4)


def test_an_embedding_has_the_scales_of_onnxruntime_and_its_integers_but_for_ties(tmp_path: Path) -> None:
    """Theirs divides where its products multiply by the inverse, and rounds halves to even."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer as Theirs

    source = graph(tmp_path / "source", inputs=128)
    table = Graph(source / "model.onnx").array("table")
    for symmetric in (True, False):
        ctx = run(PASSES[0], source, tmp_path / str(symmetric), block_size=16, is_symmetric=symmetric)
        found = Graph(ctx.out / "model.onnx")
        packed, scales, _ = Theirs.quantize_ndarray(table, 1, 16, symmetric)
        np.testing.assert_array_equal(found.array("table_scales"), scales)
        their = codes(packed.reshape(50, 64), 4).astype(int)
        mine = codes(found.array("table_Q4"), 4).astype(int)
        their = their ^ 8 if symmetric else their
        assert (their != mine).mean() < 2e-3
        assert np.abs(their - mine).max() <= 1


def test_embeddings_stay_where_their_bytes_are_not_whole_or_no_kernel_was_verified(tmp_path: Path) -> None:
    source = graph(tmp_path / "source", inputs=101)
    ctx = run(PASSES[0], source, tmp_path / "ours")
    assert ctx.facts["left"] == [{"name": "embed", "reason": "rows of 101 weights do not fill bytes"}]
    found = resolve(PASSES[0])().find(
        Graph(source / "model.onnx"), resolve(PASSES[0]).Params(), "QNNExecutionProvider"
    )
    assert [one.label for one in found.products] == ["first", "second", "third"]
    assert "QNNExecutionProvider" in found.left["embed"]


def test_what_chooses_experts_is_left(tmp_path: Path) -> None:
    draw = np.random.default_rng(6)
    weights = {
        name: draw.normal(size=shape).astype(np.float32)
        for name, shape in (("r", (32, 4)), ("fc1", (4, 32, 32)), ("fc2", (4, 32, 32)), ("n", (32, 32)))
    } | {"shape": np.array([-1, 4])}
    source = save(
        tmp_path / "source",
        [
            helper.make_node("MatMul", ["x", "n"], ["h"], "up_proj"),
            helper.make_node("MatMul", ["h", "r"], ["scores"], "chooses"),
            helper.make_node("Reshape", ["scores", "shape"], ["flat"], "flatten"),
            helper.make_node(
                "MoE", ["h", "flat", "fc1", "", "fc2"], ["y"], "experts", domain="com.microsoft", k=1
            ),
            helper.make_node("MatMul", ["x", "r"], ["z"], "/mlp/gate/MatMul"),
        ],
        [("x", TensorProto.FLOAT, ["n", 32])],
        [("y", TensorProto.FLOAT, ["n", 32]), ("z", TensorProto.FLOAT, ["n", 4])],
        weights,
    )
    ctx = run(PASSES[2], source, tmp_path / "ours", block_size=16)
    assert [row["name"] for row in ctx.facts["layers"]] == ["up_proj"]
    assert [row["name"] for row in ctx.facts["left"]] == ["chooses", "/mlp/gate/MatMul"]


def test_bfloat16_keeps_its_type(tmp_path: Path) -> None:
    import ml_dtypes

    source = graph(tmp_path / "source", dtype=ml_dtypes.bfloat16)
    before = Graph(source / "model.onnx").array("shared").astype(np.float64)
    found = Graph(run(PASSES[1], source, tmp_path / "ours").out / "model.onnx")
    assert found.weights["shared_scales"].data_type == TensorProto.BFLOAT16
    error = expanded(found, "shared", 4, 32, 96).T - before
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(before)


def test_a_weight_cut_into_parts_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = graph(tmp_path / "source", inputs=96, outputs=600)
    whole = run(PASSES[1], source, tmp_path / "a").out
    monkeypatch.setattr("olive.passes.onnx.weights._PART", 1)  # 256 rows at a time
    parts = run(PASSES[1], source, tmp_path / "b").out
    assert (whole / "model.onnx.data").read_bytes() == (parts / "model.onnx.data").read_bytes()


def test_a_plan_holds_bits_and_blocks_against_the_table_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "olive.passes.quantize.kernels.VERIFIED", {"CPUExecutionProvider": {4: (32,), 8: (16,)}}
    )
    info = ModelInfo(path=tmp_path, kind=Kind.ONNX, config={}, tensors={})
    technique = resolve(PASSES[1])
    params = technique.Params.model_validate({"customized_weight_config": {"a": {"bits": 8}}})
    found = list(technique().check(info, params, probe(), Accelerator()))
    assert [str(one).splitlines()[0] for one in found] == [
        "block_size: CPUExecutionProvider has no verified kernel for 8 bits in blocks of 32"
    ]
    with pytest.raises(ValueError, match="block_size"):
        technique.Params.model_validate({"block_size": 48})


def test_a_plan_knows_the_nodes_of_an_input_that_is_a_graph(tmp_path: Path) -> None:
    info = describe_graph(graph(tmp_path / "source"), "model.onnx")
    technique = resolve(PASSES[1])
    params = technique.Params.model_validate(
        {"nodes_to_exclude": ["first"], "customized_weight_config": {"secnd": {"bits": 8}}}
    )
    found = list(technique().check(info, params, probe(), Accelerator()))
    assert [(one.message, one.fix) for one in found] == [
        ("model.onnx has no node 'secnd'", "did you mean `second`?")
    ]


def test_a_bundle_whose_graph_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text('{"model": {"decoder": {"filename": "../m.onnx"}}}')
    with pytest.raises(UntrustedInput, match="another folder"):
        graph_file(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match="decoder"):
        graph_file(tmp_path)


def test_by_a_document_of_today_and_of_olive(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    document = {
        "input_model": {"type": "OnnxModel", "model_path": str(source)},
        "passes": {
            "q": {
                "type": "onnxblockwisertnquantization",
                "block_size": 32,
                "axis": 0,
                "nodes_to_exclude": None,
            },
            "d": {"type": "MatMulNBitsToQDQ", "use_int4": True, "save_as_external_data": True},
        },
    }
    made = workflows.run(document, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    assert [[gate.gate for gate in step.gates] for step in made.steps] == [["graph"], ["graph"]]
    found = Graph(tmp_path / "out" / "model" / "model.onnx")
    kinds = [node.op_type for node in found.model.graph.node]
    assert kinds == ["GatherBlockQuantized", *["DequantizeLinear", "MatMul"] * 2, "MatMul"]


def test_settings_are_those_of_the_operator() -> None:
    assert Settings(4, 32, True).grid.kind == "full_range"
