"""Float16 of ONNX graphs: the bits of the weights, the types, and what onnxruntime then computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import tiny
from adapter_kit import context
from graph_kit import FLOAT, INT64, mlp, model_of, outputs_of, relative, run, save, transformer, weights_of
from olive.config.gates import BundleGate, ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import bundle, parity
from olive.errors import PassFailed, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.onnx.half import DEFAULT_BLOCKED
from olive.passes.onnx.rounding import rounded
from olive.passes.registry import resolve

HALF = TensorProto.FLOAT16
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
X = np.random.default_rng(1).normal(size=(4, 16)).astype("float32")


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Of every value, by ONNX's own inference; contradictions raise."""
    made = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    found = {one.name: one.data_type for one in made.graph.initializer}
    for one in (*made.graph.input, *made.graph.value_info, *made.graph.output):
        found[one.name] = one.type.tensor_type.elem_type
    return found


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("provider", [CUDA, CPU])
def test_weights_are_rounded_as_numpy_rounds(tmp_path: Path, provider: str, outside: bool) -> None:
    source = mlp(tmp_path / "source", outside=outside)
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "made", provider=provider)
    before, after = weights_of(source), weights_of(ctx.out)
    assert set(before) == set(after)
    for name, weight in before.items():
        assert after[name].dtype == np.float16
        np.testing.assert_array_equal(after[name], weight.astype(np.float16))
    assert {row["name"] for row in ctx.facts["layers"]} == set(before)
    wide = before["first"].astype("float64")
    error = (
        np.square(before["first"].astype("float16").astype("float64") - wide).sum() / np.square(wide).sum()
    )
    told = {row["name"]: row["weight_error"] for row in ctx.facts["layers"]}
    assert told["first"] == pytest.approx(error, rel=1e-9)
    assert ctx.attributes["precision"] == "fp16"
    made = types(model_of(ctx.out))
    assert made["x"] == made["y"] == HALF
    got = outputs_of(ctx.out, x=X.astype("float16"))["y"]
    assert relative(got, outputs_of(source, x=X)["y"]) < 2e-3  # 11 bits


def test_a_provider_without_kernels_computes_in_float32_with_casts_at_its_ends(tmp_path: Path) -> None:
    source = mlp(tmp_path / "source")
    on_gpu = model_of(run("OnnxFloatToFloat16", source, tmp_path / "a", provider=CUDA).out)
    assert [node.op_type for node in on_gpu.graph.node] == ["MatMul", "Add", "Relu", "MatMul"]
    assert set(types(on_gpu).values()) == {HALF}
    made = run("OnnxFloatToFloat16", source, tmp_path / "b", provider=CPU)
    kinds = [node.op_type for node in model_of(made.out).graph.node]
    assert kinds == ["Cast"] * 4 + ["MatMul", "Add", "Relu", "MatMul", "Cast"]  # three weights, x, y
    assert made.facts["casts"] == 5
    assert made.facts["nodes"] == 0


@pytest.mark.parametrize("keep", [True, ["x"], ["y"]])
def test_inputs_and_outputs_stay_float32_where_asked(tmp_path: Path, keep: Any) -> None:
    source = mlp(tmp_path / "source")
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "made", provider=CUDA, keep_io_types=keep)
    made = types(model_of(ctx.out))
    kept = {"x", "y"} if keep is True else set(keep)
    assert {name for name in ("x", "y") if made[name] == FLOAT} == kept
    x = X if "x" in kept else X.astype("float16")
    got = outputs_of(ctx.out, x=x)["y"]
    assert got.dtype == (np.float32 if "y" in kept else np.float16)
    assert relative(got, outputs_of(source, x=X)["y"]) < 2e-3


def test_blocked_nodes_and_operators_keep_float32_weights(tmp_path: Path) -> None:
    source = mlp(tmp_path / "source")
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "a", provider=CUDA, node_block_list=["two"])
    made = types(model_of(ctx.out))
    assert made["last"] == FLOAT
    assert made["first"] == HALF
    assert made["c"] == HALF
    assert made["y"] == HALF
    np.testing.assert_array_equal(weights_of(ctx.out)["last"], weights_of(source)["last"])
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "b", provider=CUDA, op_block_list=["Add", "Relu"])
    made = types(model_of(ctx.out))
    assert [made[name] for name in ("bias", "b", "c")] == [FLOAT] * 3
    assert [made[name] for name in ("first", "last", "a")] == [HALF] * 3
    kinds = [node.op_type for node in model_of(ctx.out).graph.node]
    assert kinds == ["MatMul", "Cast", "Add", "Relu", "Cast", "MatMul"]
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "c", provider=CUDA, node_include_list=["two"])
    assert {n for n, one in weights_of(ctx.out).items() if one.dtype == np.float16} == {"last"}
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "d", provider=CUDA, op_include_list=["Relu"])
    assert ctx.facts["nodes"] == 1
    assert ctx.facts["layers"] == []


def test_magnitudes_outside_of_the_limits(tmp_path: Path) -> None:
    weight = np.array([[1e6, -7e4, np.inf, -np.inf], [1e-9, -1e-9, 0.0, 3.0]], dtype="float32")
    source = save(
        tmp_path / "source",
        [helper.make_node("Add", ["x", "w"], ["y"], "plus")],
        {"x": (FLOAT, [2, 4])},
        {"y": (FLOAT, [2, 4])},
        {"w": weight},
    )
    ctx = run(
        "OnnxFloatToFloat16", source, tmp_path / "a", provider=CUDA, max_finite_val=6e4, min_positive_val=1e-6
    )
    want = np.array([[6e4, -6e4, np.inf, -np.inf], [1e-6, -1e-6, 0.0, 3.0]]).astype("float16")
    np.testing.assert_array_equal(weights_of(ctx.out)["w"], want)
    assert ctx.facts["layers"][0]["clipped"] == 2
    assert ctx.facts["layers"][0]["raised"] == 2
    assert any("2 values above 60000" in note for note in ctx.progress.notes)  # type: ignore[attr-defined]
    again = run("OnnxFloatToFloat16", source, tmp_path / "b", provider=CUDA)
    assert weights_of(again.out)["w"][0, 0] == np.float16(1e4)


def test_magnitudes_as_onnxruntime_moves_them() -> None:
    from onnxruntime.transformers.float16 import convert_np_to_float16

    draw = np.random.default_rng(0)
    value = (draw.normal(size=20_000) * 10.0 ** draw.uniform(-12, 8, 20_000)).astype("float32")
    value[:6] = [0, -0.0, np.inf, -np.inf, np.nan, 65504]
    for low, high in ((1e-7, 1e4), (2.0**-24, 65504.0)):
        made, few, many = rounded(value, low, high)
        want = convert_np_to_float16(value, low, high)
        np.testing.assert_array_equal(made.view(np.uint16), want.view(np.uint16))
        size = np.abs(value)
        assert few == ((size > 0) & (size < low)).sum()
        assert many == ((size > high) & np.isfinite(size)).sum()


def branchy(folder: Path) -> Path:
    """Subgraphs that read from outside, types by attribute, a Range, a Resize and two uses of a weight."""
    draw = np.random.default_rng(2)

    def branch(name: str, kind: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(kind, ["h", "w"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, [3, 4])],
        )

    nodes = [
        helper.make_node("Constant", [], ["half"], "constant", value_float=0.5),
        helper.make_node("Mul", ["x", "half"], ["h"], "mul"),
        helper.make_node(
            "If", ["yes"], ["i"], "if", then_branch=branch("t", "Mul"), else_branch=branch("e", "Add")
        ),
        helper.make_node("Cast", ["n"], ["m"], "cast", to=FLOAT),
        helper.make_node("Add", ["i", "m"], ["j"], "add"),
        helper.make_node("CumSum", ["j", "axis"], ["k"], "sum"),
        helper.make_node("Mul", ["k", "w"], ["l"], "again"),
        helper.make_node("Resize", ["l", "", "scales"], ["y"], "resize", mode="nearest"),
        helper.make_node("Identity", ["k"], ["z"], "same"),
    ]
    return save(
        folder,
        nodes,
        {"x": (FLOAT, [3, 4]), "yes": (TensorProto.BOOL, []), "n": (INT64, [4])},
        {"y": (FLOAT, [3, 8]), "z": (FLOAT, [3, 4])},
        {
            "w": draw.normal(size=4).astype("float32"),
            "axis": np.array(1),
            "scales": np.array([1, 2], dtype="float32"),
        },
        infer=False,
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("provider", [CUDA, CPU])
def test_subgraphs_stay_float32_and_fixed_types_are_left(tmp_path: Path, provider: str, keep: bool) -> None:
    source = branchy(tmp_path / "source")
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "made", provider=provider, keep_io_types=keep)
    onnx.checker.check_model(model_of(ctx.out), full_check=True)
    made = weights_of(ctx.out)
    assert made["scales"].dtype == np.float32  # Resize has it so
    assert made["w"].dtype == np.float32
    assert made["w_float16"].dtype == np.float16
    inputs: dict[str, Any] = {"x": X[:3, :4], "n": np.array([1, 2, 3, 4])}
    for yes in (True, False):
        want = outputs_of(source, yes=np.array(yes), **inputs)
        x = inputs["x"] if keep else inputs["x"].astype("float16")
        got = outputs_of(ctx.out, yes=np.array(yes), n=inputs["n"], x=x)
        for name in want:
            assert got[name].dtype == (np.float32 if keep else np.float16)
            assert relative(got[name], want[name]) < 2e-3


def test_inputs_that_kernels_read_as_float32(tmp_path: Path) -> None:
    weights = {"gamma": np.ones(4, "float32"), "beta": np.zeros(4, "float32")}
    attributes = {"groups": 2, "activation": 0, "channels_last": 1, "domain": "com.microsoft"}
    node = helper.make_node("GroupNorm", ["x", "gamma", "beta"], ["y"], "norm", **attributes)
    places = {name: (FLOAT, [1, 2, 2, 4]) for name in ("x", "y")}
    source = save(tmp_path / "source", [node], {"x": places["x"]}, {"y": places["y"]}, weights)
    ctx = run("OnnxFloatToFloat16", source, tmp_path / "made", provider=CUDA)
    assert {one.dtype for one in weights_of(ctx.out).values()} == {np.dtype("float32")}
    assert [node.op_type for node in model_of(ctx.out).graph.node] == ["GroupNorm"]
    assert model_of(ctx.out).graph.output[0].type.tensor_type.elem_type == HALF


@pytest.mark.parametrize("provider", [CUDA, CPU])
def test_a_head_that_float16_does_not_hold_stays_float32(tmp_path: Path, provider: str) -> None:
    source = mlp(tmp_path / "wide", head=1000.0)
    ctx = run("OrtMixedPrecision", source, tmp_path / "a", provider=provider)
    last = weights_of(source)["last"]
    change = np.abs(last - last.astype("float16").astype("float32")).max()
    assert ctx.facts["head_change"] == pytest.approx(float(change), rel=1e-6)
    assert ctx.facts["head"] == "two"
    assert ctx.facts["head_float32"]
    made = types(model_of(ctx.out))
    assert made["last"] == made["y"] == FLOAT
    assert made["x"] == HALF
    assert made["first"] == HALF
    assert made["b"] == made["c"] == FLOAT  # Add and Relu
    got = outputs_of(ctx.out, x=X.astype("float16"))["y"]
    assert relative(got, outputs_of(source, x=X)["y"]) < 2e-3


def test_weights_that_float16_holds_are_all_stored_so(tmp_path: Path) -> None:
    source = mlp(tmp_path / "source")
    model = model_of(source)
    for one in model.graph.initializer:
        value = onnx.numpy_helper.to_array(one).astype("float16").astype("float32")
        one.CopyFrom(onnx.numpy_helper.from_array(value, one.name))
    onnx.save(model, source / "model.onnx")
    ctx = run("OrtMixedPrecision", source, tmp_path / "made", provider=CUDA)
    made = types(model_of(ctx.out))
    assert ctx.facts["head_change"] == 0
    assert not ctx.facts["head_float32"]
    assert [made[name] for name in ("first", "bias", "last", "y")] == [HALF] * 4
    assert made["b"] == FLOAT
    assert all(row["weight_error"] == 0 for row in ctx.facts["layers"])
    # an atol above every change says the same of the drawn weights
    loose = run("OrtMixedPrecision", mlp(tmp_path / "drawn"), tmp_path / "b", provider=CUDA, atol=1.0)
    assert not loose.facts["head_float32"]


@pytest.mark.parametrize("provider", [CUDA, CPU])
@pytest.mark.parametrize("name", ["OnnxFloatToFloat16", "OrtMixedPrecision"])
def test_a_layer_of_a_transformer(tmp_path: Path, name: str, provider: str) -> None:
    source = transformer(tmp_path / "source")
    ctx = run(name, source, tmp_path / "made", provider=provider)
    made = types(model_of(ctx.out))
    assert made["m1"] == FLOAT  # a cast of whole numbers stays what it is
    assert made["y"] == (FLOAT if name == "OrtMixedPrecision" else HALF)
    assert made["input_ids"] == INT64
    inputs = {"input_ids": np.array([[3, 1, 39, 7]]), "attention_mask": np.array([[1, 1, 1, 0]])}
    got, want = outputs_of(ctx.out, **inputs)["y"], outputs_of(source, **inputs)["y"]
    assert 1e-6 < relative(got, want) < 2e-3


def test_names_that_the_graph_does_not_have(tmp_path: Path) -> None:
    source = mlp(tmp_path / "source")
    for params, said in (
        ({"node_block_list": ["tow"]}, "no node 'tow'"),
        ({"keep_io_types": ["logits"]}, "no input or output 'logits'"),
        ({"op_include_list": ["Matmul"]}, "no operator 'Matmul'"),
        ({"op_block_list": ["MatMul", "Add", "Relu"]}, "nothing in float32"),
    ):
        with pytest.raises(PassFailed, match=said):
            run("OnnxFloatToFloat16", source, tmp_path / said, provider=CUDA, **params)


def check(name: str, kind: Kind, provider: str, **params: Any) -> list[str]:
    technique = resolve(name)
    info = ModelInfo(path=Path("m"), kind=kind, config={}, tensors={})
    accelerator = Accelerator(execution_providers=(provider,))  # type: ignore[arg-type]
    found = technique().check(info, technique.Params.model_validate(params), probe(), accelerator)
    return [one.message for one in found if one.severity is Severity.ERROR]


def test_what_cannot_run_is_refused_at_plan() -> None:
    name = "OnnxFloatToFloat16"
    assert "second token" in check(name, Kind.GENAI, CPU)[0]
    assert check(name, Kind.GENAI, CPU, keep_io_types=True) == []
    assert "one buffer" in check(name, Kind.GENAI, CUDA, keep_io_types=True)[0]
    assert check(name, Kind.GENAI, CUDA) == check(name, Kind.ONNX, CPU) == []
    assert (
        "exclude each other"
        in check(name, Kind.ONNX, CUDA, op_block_list=["Add"], op_include_list=["Mul"])[0]
    )
    assert "not below" in check(name, Kind.ONNX, CUDA, min_positive_val=2, max_finite_val=1)[0]
    assert "second token" in check("OrtMixedPrecision", Kind.GENAI, CPU)[0]


def test_the_operators_that_are_left_by_default_are_those_of_onnxruntime() -> None:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST

    assert set(DEFAULT_BLOCKED) == set(DEFAULT_OP_BLOCK_LIST)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tiny.tiny_phi3(tmp_path_factory.mktemp("source"), initializer_range=0.2)
    ctx = context(tmp_path_factory.mktemp("export"))
    ModelBuilder().run(
        Artifact(kind=Kind.HF, path=source, digest="0" * 64),
        ModelBuilder.Params.model_validate({"precision": "fp32"}),
        ctx,
    )
    return ctx.out


def test_a_bundle_on_the_cpu_stores_float16_and_passes_its_gates(exported: Path, tmp_path: Path) -> None:
    ctx = run("OnnxFloatToFloat16", exported, tmp_path / "a", kind=Kind.GENAI, keep_io_types=True)
    before = Artifact(kind=Kind.GENAI, path=exported, digest="0" * 64)
    prompts = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]
    found = parity.check(before, ctx.out, ParityGate(), ctx, prompts)
    assert 0 < found.figures["kl"] < 1e-4
    assert bundle.check(before, ctx.out, BundleGate(), ctx, prompts).figures["tokens"] > 0
    assert json.loads((ctx.out / "genai_config.json").read_text()) == json.loads(
        (exported / "genai_config.json").read_text()
    )
    size = [sum(path.stat().st_size for path in folder.glob("*.onnx*")) for folder in (exported, ctx.out)]
    assert size[1] < 0.65 * size[0]
    with pytest.raises(PassFailed, match="second token"):
        run("OnnxFloatToFloat16", exported, tmp_path / "b", kind=Kind.GENAI)


@pytest.mark.parametrize("name", ["OnnxFloatToFloat16", "OrtMixedPrecision"])
def test_a_bundle_for_a_gpu_has_a_cache_in_float16(exported: Path, tmp_path: Path, name: str) -> None:
    """Its first tokens: the CPU's float16 attention fails only later."""
    ctx = run(name, exported, tmp_path / "a", kind=Kind.GENAI, provider=CUDA)
    model = model_of(ctx.out)
    caches = [
        one for one in (*model.graph.input, *model.graph.output) if "key" in one.name or "value" in one.name
    ]
    assert len(caches) == 8
    assert all(one.type.tensor_type.elem_type == HALF for one in caches)
    prompt = [11, 52, 97, 200, 33, 64, 120, 7]
    config = parity._read_config(ctx.out)
    got = parity._Runtime(ctx.out, config, CPU).logits(prompt).numpy()
    want = parity._Runtime(exported, config, CPU).logits(prompt).numpy()
    assert relative(got, want) < 5e-3
