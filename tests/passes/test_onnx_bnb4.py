"""NF4 and FP4 on ONNX graphs, against ONNX Runtime's own quantiser and kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from olive.errors import PassFailed
from olive.passes.onnx.graphs import Graph
from olive.quantization.blockwise import codes_of
from onnx_kit import graph, outputs_of, run

NAME = "OnnxBnb4Quantization"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("block", "inputs", "outputs", "dtype"),
    [
        (64, 128, 400, np.float32),
        (16, 101, 9, np.float32),
        (256, 99, 77, np.float16),
        (64, 512, 700, np.float16),
    ],
)
def test_bits_of_onnxruntime(
    tmp_path: Path, kind: str, block: int, inputs: int, outputs: int, dtype: Any
) -> None:
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    source = graph(tmp_path / "source", inputs=inputs, outputs=outputs, dtype=dtype)
    found = Graph(run(NAME, source, tmp_path / "ours", precision=kind, block_size=block).out / "model.onnx")
    theirs = MatMulBnb4Quantizer(onnx.load(source / "model.onnx"), int(kind == "nf4"), block)
    theirs.process()
    wanted = {one.name: numpy_helper.to_array(one) for one in theirs.model.graph().initializer}
    assert set(wanted) == set(found.weights)
    for name in ("shared_Bnb4", "shared_absmax", "own_Bnb4", "own_absmax"):
        np.testing.assert_array_equal(found.array(name), wanted[name])
    assert [n.name for n in found.model.graph.node] == [n.name for n in theirs.model.graph().node]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block", "inputs"), [(16, 96), (32, 100), (64, 101), (128, 96), (256, 96)])
def test_the_runtime_multiplies_by_what_the_codes_stand_for(
    tmp_path: Path, kind: Any, block: int, inputs: int
) -> None:
    source = graph(tmp_path / "source", inputs=inputs)
    ctx = run(NAME, source, tmp_path / "ours", precision=kind, block_size=block)
    found = Graph(ctx.out / "model.onnx")
    packed = torch.from_numpy(found.array("shared_Bnb4").copy()).int()
    values = codes_of(kind)[torch.stack([packed >> 4, packed & 15], 1).reshape(-1)].double().numpy()
    count = 40 * inputs
    scales = found.array("shared_absmax").astype(np.float64).repeat(block)[:count]
    expanded = (values[:count] * scales).reshape(40, inputs)
    got = outputs_of(ctx.out, [3, 49, 0])
    np.testing.assert_allclose(got["a"], got["x"].astype(np.float64) @ expanded.T, atol=1e-4)
    before = Graph(source / "model.onnx").array("shared").T
    share = np.square(expanded - before).sum() / np.square(before.astype(np.float64)).sum()
    assert ctx.facts["layers"][0]["weight_error"] == pytest.approx(share, rel=1e-4)
    assert ctx.attributes["precision"] == "int4"


def test_modules_by_name(tmp_path: Path) -> None:
    source = graph(tmp_path / "source")
    model = onnx.load(source / "model.onnx")
    for number, name in enumerate(("q_proj", "k_proj", "q_proj"), 1):
        model.graph.node[number].name = f"/layers.{number}/{name}/MatMul"
    onnx.save(model, source / "model.onnx")
    found = Graph(run(NAME, source, tmp_path / "ours", quantized_modules=["q_proj"]).out / "model.onnx")
    kinds = [node.op_type for node in found.model.graph.node]
    assert kinds == ["Gather", "MatMulBnb4", "MatMul", "MatMulBnb4"]
    with pytest.raises(PassFailed, match="did you mean `q_proj`"):
        run(NAME, source, tmp_path / "b", quantized_modules=["q_prj"])
