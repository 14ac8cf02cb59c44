"""Weights and activations of ONNX graphs to integers: scales by hand, ranges of what was fed, what runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny
import training_kit
from adapter_kit import context
from graph_kit import (
    FLOAT,
    INT64,
    mlp,
    model_of,
    outputs_of,
    relative,
    rows,
    run,
    save,
    transformer,
    weights_of,
)
from olive import workflows
from olive.config.gates import BundleGate, ParityGate
from olive.config.workflow import Accelerator, DataConfig
from olive.data.plan import Preview
from olive.engine.gates import bundle, parity
from olive.errors import ConfigError, PassFailed, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.onnx.feeds import Feeds, Input
from olive.passes.onnx.histograms import BINS, Histogram
from olive.passes.registry import resolve

DYNAMIC, STATIC = "OnnxDynamicQuantization", "OnnxStaticQuantization"
DRAW = np.random.default_rng(7)
ROWS = [DRAW.normal(size=(3, 16)).astype("float32") for _ in range(16)]
X = np.concatenate(ROWS[:2])


def kinds(folder: Path) -> list[str]:
    return [node.op_type for node in model_of(folder).graph.node]


@pytest.fixture
def data(tmp_path: Path) -> dict[str, DataConfig]:
    return rows(tmp_path / "data", [{"x": one.tolist()} for one in ROWS])


def static(source: Path, scratch: Path, data: dict[str, DataConfig], **params: Any) -> Any:
    return run(STATIC, source, scratch, data=data, data_config="calibration", **params)


def affine(low: float, high: float, smallest: int, largest: int) -> tuple[float, int]:
    """Scale and zero point of the range that holds ``low``, ``high`` and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (largest - smallest)
    return scale, round(smallest - low / scale)


@pytest.mark.parametrize("name", [DYNAMIC, STATIC])
@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_scales_and_zero_points_of_weights(
    tmp_path: Path, data: dict[str, DataConfig], name: str, precision: str
) -> None:
    source = mlp(tmp_path / "source")
    more = {"data_config": "calibration", "activation_type": "uint8"} if name == STATIC else {}
    ctx = run(name, source, tmp_path / "made", data=data, precision=precision, per_channel=True, **more)
    weight, made = weights_of(source)["last"].astype("float64"), weights_of(ctx.out)
    low, high = np.minimum(weight.min(0), 0), np.maximum(weight.max(0), 0)
    if precision == "int8":
        scale, zero = np.abs(weight).max(0) / 127, np.zeros(8)
    elif name == STATIC:  # QDQ weights with several scales have one zero point
        scale, zero = 2 * np.abs(weight).max(0) / 255, np.full(8, 128)
    else:
        scale = (high - low) / 255
        zero = np.round(-low / scale)
    np.testing.assert_allclose(made["last_scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(made["last_zero_point"], zero)
    codes = np.round(weight / scale) + zero
    codes = np.clip(codes, *((-128, 127) if precision == "int8" else (0, 255)))
    assert made["last_quantized"].dtype == np.dtype(precision)
    assert np.abs(made["last_quantized"] - codes).max() <= 1  # ties of float32
    assert (made["last_quantized"] != codes).mean() < 0.01
    told = {row["name"]: row for row in ctx.facts["layers"]}
    stands_for = (made["last_quantized"].astype("float64") - made["last_zero_point"]) * made["last_scale"]
    error = np.square(stands_for - weight).sum() / np.square(weight).sum()
    assert told["last"]["weight_error"] == pytest.approx(error, rel=1e-6)
    assert told["last"]["scales"] == 8
    assert relative(outputs_of(ctx.out, x=X)["y"], outputs_of(source, x=X)["y"]) < 0.03
    assert ctx.attributes["precision"] == "int8"


def test_ranges_are_those_of_what_was_fed(tmp_path: Path, data: dict[str, DataConfig]) -> None:
    source = mlp(tmp_path / "source")
    ctx = static(source, tmp_path / "made", data, quant_preprocess=False)
    made, own = weights_of(ctx.out), weights_of(source)
    fed = np.concatenate(ROWS)
    a = fed @ own["first"]
    c = np.maximum(a + own["bias"], 0)
    for name, value in (("x", fed), ("a", a), ("c", c), ("y", c @ own["last"])):
        scale, zero = affine(float(value.min()), float(value.max()), -128, 127)
        assert made[f"{name}_scale"] == pytest.approx(scale, rel=1e-5)
        assert made[f"{name}_zero_point"] == zero
        assert made[f"{name}_zero_point"].dtype == np.int8
    assert ctx.facts["activations"] == 5
    assert ctx.facts["calibration_rows"] == 16


def test_a_moving_average_of_ranges_and_one_that_is_symmetric(
    tmp_path: Path, data: dict[str, DataConfig]
) -> None:
    source, part = mlp(tmp_path / "source"), 0.25
    options: dict[str, Any] = {"CalibMovingAverage": True, "CalibMovingAverageConstant": part}
    moved = weights_of(static(source, tmp_path / "a", data, extra_options=options).out)
    low, high = float(ROWS[0].min()), float(ROWS[0].max())
    for one in ROWS[1:]:
        low, high = low + part * (float(one.min()) - low), high + part * (float(one.max()) - high)
    assert moved["x_scale"] == pytest.approx((high - low) / 255, rel=1e-5)
    even = {"CalibTensorRangeSymmetric": True}
    made = weights_of(static(source, tmp_path / "b", data, extra_options=even).out)
    assert made["x_scale"] == pytest.approx(2 * np.abs(np.concatenate(ROWS)).max() / 255, rel=1e-5)
    made = weights_of(static(source, tmp_path / "c", data, activation_symmetric=True).out)
    assert made["x_scale"] == pytest.approx(np.abs(np.concatenate(ROWS)).max() / 127, rel=1e-5)
    assert made["x_zero_point"] == 0
    options = {"MinimumRealRange": 1000.0}
    for number, given in enumerate(({"min_real_range": 1000.0}, {"extra_options": options})):
        wide = weights_of(static(source, tmp_path / f"d{number}", data, **given).out)
        assert wide["x_scale"] == pytest.approx(1000 / 255, rel=1e-5)


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_the_numbers_are_those_of_onnxruntime(tmp_path: Path, data: dict[str, DataConfig], form: str) -> None:
    from onnxruntime import quantization as theirs

    class Reader(theirs.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(ROWS)

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.rows, None)
            return None if found is None else {"x": found}

    source, wanted = mlp(tmp_path / "source"), tmp_path / "theirs.onnx"
    theirs.quantize_static(
        str(mlp(tmp_path / "copy", outside=False) / "model.onnx"),
        str(wanted),
        Reader(),
        quant_format=theirs.QuantFormat[form],
        per_channel=True,
        activation_type=theirs.QuantType.QUInt8,
        weight_type=theirs.QuantType.QInt8,
    )
    ctx = static(
        source,
        tmp_path / "made",
        data,
        quant_format=form,
        per_channel=True,
        activation_type="uint8",
        prepare_qdq_config=False,
        quant_preprocess=False,
    )
    want = {one.name: numpy_helper.to_array(one) for one in onnx.load(wanted).graph.initializer}
    made = weights_of(ctx.out)
    assert set(made) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(made[name], value)


def test_methods_give_other_ranges(tmp_path: Path) -> None:
    source = mlp(tmp_path / "source")
    draw = np.random.default_rng(0).normal(size=(40, 50, 16))
    draw[3, 2, 1] = 60.0  # one outlier
    data = rows(tmp_path / "data", [{"x": one.tolist()} for one in draw])
    scales = {}
    for method in ("MinMax", "Percentile", "Entropy"):
        options = {"CalibPercentile": 99.9} if method == "Percentile" else {}
        ctx = static(source, tmp_path / method, data, calibrate_method=method, extra_options=options)
        scales[method] = float(weights_of(ctx.out)["x_scale"])
        assert ctx.facts["calibrate_method"] == method
    assert scales["MinMax"] == pytest.approx((60 - draw.min()) / 255, rel=1e-5)
    cut = np.percentile(np.abs(draw), 99.9)
    assert scales["Percentile"] == pytest.approx(2 * cut / 255, abs=2 * 60 / BINS / 255)
    assert 2 * 2.5 / 255 < scales["Entropy"] < 2 * 10 / 255


def test_percentiles_and_entropy_against_plain_loops() -> None:
    values = np.random.default_rng(3).laplace(size=20_000).astype("float32")
    values[0] = 40.0
    one = Histogram(float(np.abs(values).max()))
    for part in np.split(values, 4):
        one.add(part)
    width = one.largest / BINS
    for percent in (50, 90, 99, 99.9):
        want = np.percentile(np.abs(values), percent)
        assert want - width <= one.percentile(percent) <= want + 2 * width
    assert one.percentile(100) == pytest.approx(one.largest)
    counts = [float(count) for count in one.counts]
    counts[0] = counts[1]
    best, cut = float("inf"), 0
    for size in range(128, BINS + 1, 8):
        wanted = counts[:size]
        wanted[-1] += sum(counts[size:])
        got = [0.0] * size
        for level in range(128):
            start, stop = level * size // 128, (level + 1) * size // 128
            full = [place for place in range(start, stop) if counts[place] > 0]
            for place in full:
                got[place] = sum(counts[start:stop]) / len(full)
        got[-1] = max(got[-1], 1e-4)
        first, second = np.array(wanted) / sum(wanted), np.array(got) / sum(got)
        lost = sum(p * np.log(p / q) for p, q in zip(first, second, strict=True) if p > 0)
        if lost < best:
            best, cut = lost, size
    assert one.entropy() == pytest.approx(cut * width)
    assert 128 < cut < BINS


@pytest.mark.parametrize(
    "params",
    [
        {"quant_format": "QDQ"},
        {"quant_format": "QDQ", "activation_type": "uint8", "per_channel": True, "prepare_qdq_config": False},
        {"quant_format": "QOperator", "activation_type": "uint8", "reduce_range": True},
        {"quant_format": "QOperator", "activation_type": "uint8", "precision": "uint8", "per_channel": True},
    ],
)
def test_a_convolution_runs_in_both_formats(tmp_path: Path, params: dict[str, Any]) -> None:
    draw = np.random.default_rng(4)
    weights = {
        "k": draw.normal(size=(8, 3, 3, 3)).astype("float32")
        * np.geomspace(0.1, 1, 8, dtype="float32")[:, None, None, None],
        "b": draw.normal(size=8).astype("float32"),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["y"], "flat"),
    ]
    source = save(tmp_path / "source", nodes, {"x": (FLOAT, [1, 3, 8, 8])}, {"y": (FLOAT, [1, 8])}, weights)
    fed = draw.normal(size=(12, 1, 3, 8, 8)).round(3)
    data = rows(tmp_path / "data", [{"x": one.tolist()} for one in fed])
    ctx = static(source, tmp_path / "made", data, **params)
    found = set(kinds(ctx.out))
    assert ("QLinearConv" if params["quant_format"] == "QOperator" else "DequantizeLinear") in found
    x = draw.normal(size=(1, 3, 8, 8)).astype("float32")
    assert relative(outputs_of(ctx.out, x=x)["y"], outputs_of(source, x=x)["y"]) < 0.03
    row = next(one for one in ctx.facts["layers"] if one["name"] == "k")
    assert row["scales"] == (8 if params.get("per_channel") else 1)
    assert 0 < row["weight_error"] < 1e-3


TOKENS = [
    {"input_ids": [DRAW.integers(0, 40, length).tolist()], "attention_mask": [[1] * length]}
    for length in range(4, 20)
]


@pytest.mark.parametrize(
    ("params", "close"),
    [
        ({"quant_mode": "dynamic"}, 0.03),
        ({"activation_type": "uint8", "calibrate_method": "Percentile"}, 0.12),
        ({"activation_type": "uint8", "op_types_to_quantize": ["MatMul"], "per_channel": True}, 0.04),
        ({"activation_type": "uint8", "quant_format": "QOperator"}, 0.12),
        ({"activation_type": "int16", "precision": "int8"}, 0.03),
    ],
)
def test_a_layer_of_a_transformer(tmp_path: Path, params: dict[str, Any], close: float) -> None:
    source = transformer(tmp_path / "source")
    data = rows(tmp_path / "data", TOKENS)
    given = {} if "quant_mode" in params else {"data_config": "calibration"}
    ctx = run("OnnxQuantization", source, tmp_path / "made", data=data, **given, **params)
    inputs = {name: np.array(value) for name, value in TOKENS[7].items()}
    error = relative(outputs_of(ctx.out, **inputs)["y"], outputs_of(source, **inputs)["y"])
    assert 1e-4 < error < close
    assert {"wq", "wk", "wv", "wo", "up", "down"} <= {row["name"] for row in ctx.facts["layers"]}


@pytest.mark.parametrize(
    ("params", "close"),
    [
        ({"precision": "int8", "activation_type": "uint16"}, 0.02),
        ({"precision": "int16", "activation_type": "int16", "per_channel": True}, 5e-4),
        ({"precision": "int4", "activation_type": "uint8", "per_channel": True}, 0.25),
        ({"precision": "uint4", "activation_type": "uint8"}, 0.25),
    ],
)
@pytest.mark.parametrize("opset", [17, 21])
def test_4_and_16_bits(
    tmp_path: Path, data: dict[str, DataConfig], params: dict[str, Any], close: float, opset: int
) -> None:
    source = mlp(tmp_path / "source", opset=opset)
    ctx = static(source, tmp_path / "made", data, op_types_to_quantize=["MatMul"], **params)
    model = model_of(ctx.out)
    domains = {node.domain for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert domains == ({"com.microsoft"} if opset < 21 else {""})
    assert {one.version for one in model.opset_import if one.domain == ""} == {opset}
    assert 1e-6 < relative(outputs_of(ctx.out, x=X)["y"], outputs_of(source, x=X)["y"]) < close
    assert {row["bits"] for row in ctx.facts["layers"]} == {int(params["precision"].split("int")[1])}
    assert ctx.attributes["precision"] == params["precision"].removeprefix("u")


def test_blocks_of_4_bits(tmp_path: Path, data: dict[str, DataConfig]) -> None:
    source = mlp(tmp_path / "source")  # operators of version 17 become those of 21
    given: dict[str, Any] = {"precision": "int4", "activation_type": "uint16"}
    given |= {"op_types_to_quantize": ["MatMul"], "extra_options": {"BlockSize": 16}}
    ctx = static(source, tmp_path / "made", data, **given)
    made, weight = weights_of(ctx.out), weights_of(source)["last"].astype("float64")
    assert made["last_scale"].shape == (2, 8)
    stands_for = made["last_quantized"].astype("float64") * made["last_scale"].repeat(16, 0)
    error = np.square(stands_for - weight).sum() / np.square(weight).sum()
    told = {row["name"]: row for row in ctx.facts["layers"]}
    assert told["last"]["weight_error"] == pytest.approx(error, rel=1e-6)
    assert told["last"]["group_size"] == 16
    assert relative(outputs_of(ctx.out, x=X)["y"], outputs_of(source, x=X)["y"]) < 0.25


def test_only_the_nodes_that_are_named(tmp_path: Path, data: dict[str, DataConfig]) -> None:
    source = mlp(tmp_path / "source")
    ctx = run(DYNAMIC, source, tmp_path / "a", nodes_to_quantize=["two"])
    assert kinds(ctx.out).count("MatMulInteger") == 1
    assert {row["name"] for row in ctx.facts["layers"]} == {"last"}
    ctx = run(DYNAMIC, source, tmp_path / "p", nodes_to_exclude=["t?o", "*us"])
    assert {row["name"] for row in ctx.facts["layers"]} == {"first"}
    ctx = static(source, tmp_path / "b", data, nodes_to_exclude=["two"], op_types_to_exclude=["Add", "Relu"])
    made = weights_of(ctx.out)
    np.testing.assert_array_equal(made["last"], weights_of(source)["last"])
    assert "first_quantized" in made
    assert "bias" in made
    own = {"x": [{"quant_type": "uint16"}]}
    ctx = static(source, tmp_path / "c", data, activation_type="uint8", tensor_quant_overrides=own)
    assert weights_of(ctx.out)["x_zero_point"].dtype == np.uint16
    assert weights_of(ctx.out)["y_zero_point"].dtype == np.uint8
    for params, said in (
        ({"nodes_to_exclude": ["tow"]}, "no node 'tow'"),
        ({"nodes_to_exclude": ["tw?o"]}, "no node"),
        ({"nodes_to_quantize": ["on"]}, "no node 'on'"),
        ({"op_types_to_quantize": ["Conv"]}, "no operator 'Conv'"),
        ({"nodes_to_quantize": ["plus"], "op_types_to_quantize": ["MatMul"]}, "nothing to quantise"),
        ({"tensor_quant_overrides": {"x": [{"quant_type": "int3"}]}}, "quant_type 'int3'"),
        ({"tensor_quant_overrides": {"xx": [{"quant_type": "int8"}]}}, "quantiser failed.*xx"),
    ):
        with pytest.raises(PassFailed, match=said):
            static(source, tmp_path / said, data, **params)


def test_nothing_is_left_behind_and_the_source_stays(
    tmp_path: Path, data: dict[str, DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mlp(tmp_path / "source")
    (source / "note.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TMPDIR", str(work))
    assert set(before) == {"model.onnx", "first", "bias", "last", "note.txt"}
    for number, name in enumerate((DYNAMIC, STATIC)):
        more = {"data_config": "calibration", "precision": "int16"} if name == STATIC else {}
        ctx = run(name, source, tmp_path / str(number), data=data, **more)
        assert {path.name for path in ctx.out.iterdir()} <= {"model.onnx", "model.onnx.data", "note.txt"}
        assert [path.name for path in ctx.out.parent.iterdir()] == ["out"]
    with pytest.raises(PassFailed):
        static(source, tmp_path / "failed", data, tensor_quant_overrides={"xx": [{}]})
    assert [path.name for path in (tmp_path / "failed").iterdir()] == ["out"]
    assert list((tmp_path / "failed" / "out").iterdir()) == []
    assert list(work.iterdir()) == []
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    large = model_of(tmp_path / "1" / "out")
    assert len(large.graph.initializer) > 0
    light = onnx.load(tmp_path / "1" / "out" / "model.onnx", load_external_data=False)
    assert any(one.data_location == TensorProto.EXTERNAL for one in light.graph.initializer)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"z": [[1.0]]}, "row 2 has no column 'x'.*float32 \\[n, 16\\]"),
        ({"x": [[1.0] * 15]}, "row 2, column 'x': shape \\[1, 15\\], where 16 is 16"),
        ({"x": [1.0] * 16}, "row 2, column 'x': shape \\[16\\]"),
        ({"x": [[1.0] * 16, [1.0]]}, "row 2, column 'x': lists of different lengths"),
        ({"x": [["a"] * 16]}, "row 2, column 'x': not numbers"),
        ({"x": [[float("nan")] * 16]}, "row 2, column 'x': NaN or infinity"),
        ({"x": [[1e39] * 16]}, "row 2, column 'x': numbers that float32 does not hold"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    data = rows(tmp_path / "data", [{"x": ROWS[0].tolist()}, row])
    with pytest.raises(ConfigError, match=said):
        static(mlp(tmp_path / "source"), tmp_path / "made", data)


def test_integer_inputs_and_dimensions_that_must_agree(tmp_path: Path) -> None:
    table = np.random.default_rng(1).normal(size=(9, 4)).astype("float32")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Mul", ["e", "x"], ["y"], "mul"),
    ]
    source = save(
        tmp_path / "source",
        nodes,
        {"ids": (INT64, ["n"]), "x": (FLOAT, ["n", 4])},
        {"y": (FLOAT, ["n", 4])},
        {"table": table},
    )
    good = {"ids": [1, 8], "x": [[1.0, 2, 3, 4]] * 2}
    ctx = static(source, tmp_path / "made", rows(tmp_path / "good", [good] * 3))
    assert any("3 rows" in note for note in ctx.progress.notes)
    x = np.ones((2, 4), "float32")
    got, want = (outputs_of(folder, ids=np.array([1, 8]), x=x)["y"] for folder in (ctx.out, source))
    assert relative(got, want) < 0.02
    for bad, said in (
        (good | {"ids": [1.5, 2]}, "column 'ids': numbers that int64 does not hold"),
        (good | {"ids": [1]}, "column 'x': shape \\[2, 4\\], where n is 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            static(source, tmp_path / said[:12], rows(tmp_path / "bad", [good, bad]))
    with pytest.raises(PassFailed, match="does not run on feed 2"):
        static(source, tmp_path / "far", rows(tmp_path / "bad", [good, good | {"ids": [1, 99]}]))


def test_nan_in_the_graph_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(4, 4)).astype("float32")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("Log", ["a"], ["b"], "log"),
        helper.make_node("IsNaN", ["b"], ["c"], "isnan"),
        helper.make_node("Where", ["c", "a", "b"], ["y"], "where"),
    ]
    source = save(tmp_path / "source", nodes, {"x": (FLOAT, [2, 4])}, {"y": (FLOAT, [2, 4])}, {"w": weight})
    fed = np.random.default_rng(2).normal(size=(8, 2, 4)).round(3)
    data = rows(tmp_path / "data", [{"x": one.tolist()} for one in fed])
    with pytest.raises(
        PassFailed, match="feed 1 of the calibration data makes b NaN, written by the Log 'log'"
    ):
        static(source, tmp_path / "a", data)
    ctx = static(source, tmp_path / "b", data, nodes_to_exclude=["log", "isnan", "where"])
    assert "w_quantized" in weights_of(ctx.out)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data config None to calibrate on"):
        run(STATIC, mlp(tmp_path / "source"), tmp_path / "made")


def test_rows_are_drawn_by_the_seed(tmp_path: Path, data: dict[str, DataConfig]) -> None:
    source = mlp(tmp_path / "source")
    ctx = static(source, tmp_path / "a", data, calibration_rows=9, seed=1)
    assert ctx.facts["calibration_rows"] == 9
    other = static(source, tmp_path / "b", data, calibration_rows=9, seed=2)
    whole = static(source, tmp_path / "c", data)
    one, two, all_of_them = (float(weights_of(each.out)["x_scale"]) for each in (ctx, other, whole))
    assert one != two
    assert max(one, two) <= all_of_them


def test_a_large_weight_that_is_also_turned_is_stored_once(tmp_path: Path) -> None:
    table = np.random.default_rng(1).normal(size=(4100, 64)).astype("float32")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], "embed"),
        helper.make_node("Transpose", ["table"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["e", "t"], ["y"], "head"),
    ]
    source = save(
        tmp_path / "source", nodes, {"ids": (INT64, ["n"])}, {"y": (FLOAT, ["n", 4100])}, {"table": table}
    )
    data = rows(tmp_path / "data", [{"ids": [1, 2, 3]}, {"ids": [4, 5, 4099]}])
    ctx = static(source, tmp_path / "made", data)
    assert (ctx.out / "model.onnx.data").stat().st_size < 1.1 * table.size
    ids = np.array([1, 4099])
    assert relative(outputs_of(ctx.out, ids=ids)["y"], outputs_of(source, ids=ids)["y"]) < 0.03


def test_old_operators_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="operators of version 9; integers need 11"):
        run(DYNAMIC, mlp(tmp_path / "source", opset=9), tmp_path / "made")


def test_tokens_in_pieces_and_padded_to_a_fixed_length() -> None:
    shape: tuple[int | str | None, ...] = ("batch", 4)
    inputs = (
        *(Input(name, np.dtype("int64"), shape) for name in ("input_ids", "attention_mask", "position_ids")),
        Input("past_key_values.0.key", np.dtype("float16"), ("batch", 2, "past", None)),
    )
    feeds = list(Feeds(inputs, [(0, (5, 6, 7, 8, 9))], True, "d", (2, 16)))
    assert [feed["input_ids"].tolist() for feed in feeds] == [[[5, 6, 7, 8]], [[9, 0, 0, 0]]]
    assert feeds[1]["attention_mask"].tolist() == [[1, 0, 0, 0]]
    assert feeds[1]["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert feeds[0]["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert feeds[0]["past_key_values.0.key"].dtype == np.float16


def check(
    name: str,
    severity: Severity,
    features: tuple[str, ...],
    provider: str = "CPUExecutionProvider",
    **params: Any,
) -> list[str]:
    technique = resolve(name)
    info = ModelInfo(path=Path("m"), kind=Kind.ONNX, config={}, tensors={})
    machine = probe().model_copy(update={"cpu_features": features})
    accelerator = Accelerator(execution_providers=(provider,))  # type: ignore[arg-type]
    found = technique().check(info, technique.Params.model_validate(params), machine, accelerator)
    return [one.message for one in found if one.severity is severity]


OLD, NEW, ARM = ("avx2", "avx512f"), ("avx2", "avx_vnni"), ("asimd",)


@pytest.mark.parametrize(
    ("params", "features", "severity", "said"),
    [
        ({"data_config": None}, NEW, Severity.ERROR, "nothing to calibrate on"),
        ({"activation_type": "int8", "precision": "uint8"}, NEW, Severity.ERROR, "no kernel for int8"),
        ({"quant_format": "QOperator"}, NEW, Severity.ERROR, "without vector instructions"),
        ({"quant_format": "QOperator", "activation_type": "int16"}, NEW, Severity.ERROR, "takes 8 bits"),
        ({"quant_format": "QOperator", "precision": "int4"}, NEW, Severity.ERROR, "on int4.* takes 8"),
        ({"precision": "int16", "reduce_range": True}, NEW, Severity.ERROR, "takes a bit off 8-bit"),
        ({"extra_options": {"QuantizeBais": False}}, NEW, Severity.ERROR, "no option 'QuantizeBais'"),
        ({"extra_options": {"SmoothQuant": True}}, NEW, Severity.ERROR, "SmoothQuant has no effect"),
        ({"extra_options": {"ActivationSymmetric": True}}, NEW, Severity.WARNING, "has no effect"),
        ({"extra_options": {"CalibPercentile": 0}}, NEW, Severity.ERROR, "not in \\(0, 100\\]"),
        (
            {"extra_options": {"CalibMovingAverage": True}, "calibrate_method": "Entropy"},
            NEW, Severity.ERROR, "calibrate_method is Entropy",
        ),
        ({"calibration_providers": ["QNNExecutionProvider"]}, NEW, Severity.ERROR, "does not run here"),
        (
            {"per_channel": True, "weight_symmetric": False, "activation_type": "uint8"},
            NEW, Severity.WARNING, "are symmetric",
        ),
        ({"activation_type": "uint16"}, NEW, Severity.WARNING, "no operators on 16-bit"),
        ({"activation_type": "uint8"}, OLD, Severity.WARNING, "no VNNI"),
        ({"activation_type": "uint8", "reduce_range": True}, NEW, Severity.WARNING, "needs no reduce_range"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told_at_plan(
    params: dict[str, Any], features: tuple[str, ...], severity: Severity, said: str
) -> None:
    import re

    given = {"data_config": "d"} | params
    found = check(STATIC, severity, features, **given)
    assert len(found) == 1
    assert re.search(said, found[0])
    assert check("OnnxQuantization", severity, features, **given) == found


def test_what_goes_together() -> None:
    for features in (OLD, NEW, ARM):
        assert check(STATIC, Severity.ERROR, features, data_config="d") == []
        assert check(DYNAMIC, Severity.ERROR, features) == []
    assert check(STATIC, Severity.ERROR, ARM, data_config="d", quant_format="QOperator") == []
    assert (
        check(STATIC, Severity.WARNING, OLD, data_config="d", activation_type="uint8", reduce_range=True)
        == []
    )
    assert "no VNNI" in check(DYNAMIC, Severity.WARNING, OLD)[0]
    assert check(DYNAMIC, Severity.WARNING, NEW) == check(DYNAMIC, Severity.WARNING, ARM) == []
    assert "no operators on int16 weights" in check(DYNAMIC, Severity.ERROR, NEW, precision="int16")[0]
    assert "zero point" in check(DYNAMIC, Severity.ERROR, NEW, activation_symmetric=True)[0]
    assert "may not have" in check(DYNAMIC, Severity.WARNING, NEW, "CUDAExecutionProvider")[0]
    both = {"quant_mode": "dynamic", "calibrate_method": "Entropy"}
    assert check("OnnxQuantization", Severity.ERROR, NEW, quant_mode="dynamic") == []
    assert "does not read calibrate_method" in check("OnnxQuantization", Severity.WARNING, NEW, **both)[0]
    assert resolve(STATIC).Params.model_validate({"weight_type": "uint8"}).precision == "uint8"  # type: ignore[attr-defined]


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


MATMUL = {"op_types_to_quantize": ["MatMul"], "activation_type": "uint8"}


@pytest.mark.parametrize(
    "params",
    [
        {"quant_mode": "dynamic", "quant_preprocess": False},
        {"quant_mode": "static"},
        {"quant_mode": "static", "quant_format": "QOperator", "calibrate_method": "Percentile", **MATMUL},
        {"quant_mode": "static", "quant_preprocess": False, "per_channel": True, **MATMUL},
    ],
)
def test_a_bundle_stays_one_and_passes_its_gates(
    exported: Path, tmp_path: Path, params: dict[str, Any]
) -> None:
    data = {"train": training_kit.data(training_kit.rows(tmp_path, 96))}
    given = {"data_config": "train", "calibration_tokens": 1000} if params["quant_mode"] == "static" else {}
    ctx = run("OnnxQuantization", exported, tmp_path / "q", kind=Kind.GENAI, data=data, **params, **given)
    if given:
        assert ctx.facts["calibration_tokens"] == 1000
        assert any("1,000 tokens" in note for note in ctx.progress.notes)  # type: ignore[attr-defined]
    before = Artifact(kind=Kind.GENAI, path=exported, digest="0" * 64)
    prompts = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]
    found = parity.check(before, ctx.out, ParityGate(), ctx, prompts)
    assert 1e-5 < found.figures["kl"] < 0.05
    assert bundle.check(before, ctx.out, BundleGate(), ctx, prompts).figures["tokens"] > 0
    assert (ctx.out / "genai_config.json").read_text() == (exported / "genai_config.json").read_text()
    assert len(ctx.facts["layers"]) >= 11
    size = [sum(path.stat().st_size for path in folder.glob("*.onnx.data")) for folder in (exported, ctx.out)]
    assert size[1] < (0.6 if "op_types_to_quantize" not in params else 0.65) * size[0]


def test_a_bundle_with_too_little_text(exported: Path, tmp_path: Path) -> None:
    data = {"train": training_kit.data(training_kit.rows(tmp_path, 4))}
    with pytest.raises(ConfigError, match="a calibration needs 256"):
        run(STATIC, exported, tmp_path / "q", kind=Kind.GENAI, data=data, data_config="train")


def test_a_plan_counts_tokens() -> None:
    technique = resolve(STATIC)
    params = technique.Params.model_validate({"data_config": "train", "calibration_tokens": 4096})
    info = ModelInfo(path=Path("m"), kind=Kind.HF, config={}, tensors={"w": ("F32", (1000, 1000))})
    machine = probe().model_copy(update={"clock": 2e9, "cores": 1, "cpu_features": NEW})
    few, enough = (Preview(name="train", rows=9, tokens=tokens) for tokens in (100, 5000))
    cost = technique().estimate(info, params, machine, {"train": enough})
    flops = 2 * 1e6 * 4096
    assert cost.seconds == pytest.approx(2.06 + flops / (0.3 * 2e9 * 32))
    with pytest.raises(ConfigError, match="train has 100 tokens"):
        technique().estimate(info, params, machine, {"train": few})
    plain = info.model_copy(update={"kind": Kind.ONNX})
    assert technique().estimate(plain, params, machine, {"train": few}).seconds == pytest.approx(2.06)


def test_by_a_document(tmp_path: Path, data: dict[str, DataConfig]) -> None:
    source = mlp(tmp_path / "source")
    rows_of = data["calibration"].model_dump(exclude_unset=True, mode="json")
    static_pass = {"type": "OnnxStaticQuantization", "data_config": "calibration", "per_channel": True}
    document: dict[str, Any] = {
        "input_model": {"type": "OnnxModel", "model_path": str(source / "model.onnx")},
        "data_configs": [rows_of],
        "passes": {"q": static_pass | {"activation_type": "uint8", "save_as_external_data": True}},
    }
    made = workflows.run(document, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "weight error" in page
    assert [gate.gate for gate in made.steps[0].gates] == ["graph"]
    assert "first_quantized" in weights_of(tmp_path / "out" / "model")
    assert len(made.steps[0].facts["layers"]) == 2
    document["passes"] = {"h": {"type": "OnnxFloatToFloat16", "use_symbolic_shape_infer": True}}
    made = workflows.run(document, output_dir=tmp_path / "half", cache_dir=tmp_path / "cache")
    assert weights_of(tmp_path / "half" / "model")["first"].dtype == np.float16
    again = document | {"input_model": {"type": "OnnxModel", "model_path": str(tmp_path / "half" / "model")}}
    again["passes"] = {"q": {"type": "OnnxDynamicQuantization"}}
    workflows.run(again, output_dir=tmp_path / "again", cache_dir=tmp_path / "cache")
    document["passes"] = {"q": static_pass | {"nodes_to_exclude": ["tow"]}}
    found = workflows.plan(document, output_dir=tmp_path / "p", cache_dir=tmp_path / "cache").findings
    assert any("no node 'tow'" in one.message for one in found)
    bad = rows(tmp_path / "bad", [{"z": [[1.0]]}], "calibration")["calibration"]
    document["data_configs"] = [bad.model_dump(exclude_unset=True, mode="json")]
    found = workflows.plan(document, output_dir=tmp_path / "p", cache_dir=tmp_path / "cache").findings
    assert any("no column 'x'" in one.message for one in found if one.severity is Severity.ERROR)
    document["passes"] = {"q": {"type": "OnnxStaticQuantization"}}
    found = workflows.plan(document, output_dir=tmp_path / "p", cache_dir=tmp_path / "cache").findings
    assert any("nothing to calibrate on" in one.message for one in found)
