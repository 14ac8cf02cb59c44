"""A model that another tool quantised, exported: the integers of its file, bit for bit, in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from foreign_kit import change_config, foreign, gguf_file, settings
from olive.config.workflow import Accelerator
from olive.errors import Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.foreign.gguf_folder import unfolded
from olive.models.hf import describe, open_model
from olive.passes.export.model_builder import ModelBuilder
from olive.passes.registry import resolve
from olive.quantization.packing import pack
from tiny import tiny_llama, tiny_phi3
from training_kit import context, data, rows

CPU = Accelerator(device="cpu", execution_providers=("CPUExecutionProvider",))


@pytest.mark.parametrize(
    ("family", "kind", "bits", "group", "sym"),
    [
        ("llama", "gptq", 4, 32, False), ("phi3", "gptq", 4, 32, False), ("llama", "gptq", 4, 32, True),
        ("llama", "gptq", 3, 32, False), ("llama", "gptq_v2", 8, 32, False), ("llama", "awq", 4, 32, False),
        ("llama", "pack-quantized", 4, -1, True), ("llama", "int-quantized", 8, 32, False),
    ],
)  # fmt: skip
def test_the_graph_holds_the_integers_of_the_file(
    tmp_path: Path, family: str, kind: str, bits: int, group: int, sym: bool
) -> None:
    make = {"llama": tiny_llama, "phi3": tiny_phi3}[family]
    source = make(tmp_path / "plain", layers=1, intermediate_size=768, tie_word_embeddings=False)
    wanted = foreign(source, tmp_path / "given", kind, bits=bits, group=group, sym=sym)
    ctx = context(tmp_path, data(rows(tmp_path)))
    params = ModelBuilder.Params.model_validate({"precision": "int4"})
    found = ModelBuilder().check(describe(tmp_path / "given"), params, probe(), CPU)
    assert not [problem for problem in found if problem.severity is Severity.ERROR]
    model = Artifact(kind=Kind.HF, path=tmp_path / "given", digest="0" * 64)
    ModelBuilder().run(model, params, ctx)
    graph = onnx.load(ctx.out / "model.onnx")
    by_name = {value.name: to_array(value) for value in graph.graph.initializer}
    wide = 4 if bits == 3 else bits
    for layer, one in wanted.items():
        last = layer.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_up_proj"):
            continue  # packed into one by the builder; down and o tell the layout
        weights = [name for name in by_name if f".{last}." in name and name.endswith("qweight")]
        assert len(weights) == 1
        repeated = by_name[weights[0].replace("qweight", "scales")].size // one.scales.size
        codes = pack(torch.from_numpy(one.codes).to(torch.uint8), wide)
        zeros = torch.from_numpy(one.zeros).to(torch.uint8).repeat_interleave(repeated, 1)
        scales = torch.from_numpy(one.scales).float().repeat_interleave(repeated, 1)
        for part, value in (("qweight", codes), ("scales", scales), ("qzeros", pack(zeros, wide))):
            made = torch.from_numpy(by_name[weights[0].replace("qweight", part)].copy())
            assert torch.equal(made.reshape(value.shape), value), part


def errors(name: str, folder: Path, provider: str = "CPUExecutionProvider", **params: object) -> list[str]:
    technique = resolve(name)
    wanted = technique.Params.model_validate(params)
    accelerator = Accelerator(device="cpu", execution_providers=(provider,))
    found = technique().check(describe(folder), wanted, probe(), accelerator)
    return [problem.message for problem in found if problem.severity is Severity.ERROR]


def test_what_no_kernel_reads_is_refused_at_plan(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "plain", layers=1, tie_word_embeddings=False)
    foreign(source, tmp_path / "eight", "gptq", bits=4, group=8)
    assert "shares a scale among 8" in errors("ModelBuilder", tmp_path / "eight", precision="int4")[0]
    foreign(source, tmp_path / "good", "gptq")
    assert "would undo that" in errors("ModelBuilder", tmp_path / "good", precision="fp32")[0]
    assert "stored quantised" in errors("KQuant", tmp_path / "good")[0]
    assert "stored quantised" in errors("MergeAdapterWeights", tmp_path / "good")[0]


def test_projections_of_different_settings_are_refused(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "plain", layers=1, tie_word_embeddings=False)
    foreign(source, tmp_path / "given", "int-quantized", bits=8)
    weights = settings("int-quantized", 8, 32, sym=True)["config_groups"]["group_0"]["weights"]
    given = settings("int-quantized", 8, 32, sym=False)
    groups = {"other": {"targets": ["re:.*q_proj"], "weights": weights}, **given["config_groups"]}
    change_config(tmp_path / "given", quantization_config=given | {"config_groups": groups})
    assert "packs them into one" in errors("ModelBuilder", tmp_path / "given", precision="int4")[0]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K"])
def test_a_gguf_file_is_exported(tmp_path: Path, kind: str) -> None:
    """Integers of Q4_0 as they are; Q4_K as the floating point it stands for, rounded by the builder."""
    source = tiny_llama(tmp_path / "plain", hidden=256, layers=1, tie_word_embeddings=False)
    folder = unfolded(gguf_file(source, tmp_path / "model.gguf", kind), tmp_path / "cache")
    params = ModelBuilder.Params.model_validate({"precision": "int4" if kind == "Q4_0" else "fp32"})
    ctx = context(tmp_path, data(rows(tmp_path)))
    ModelBuilder().run(Artifact(kind=Kind.HF, path=folder, digest="0" * 64), params, ctx)
    by_name = {value.name: to_array(value) for value in onnx.load(ctx.out / "model.onnx").graph.initializer}
    name = "model.layers.0.mlp.down_proj"
    tensors, _ = open_model(folder)
    with tensors:
        if kind == "Q4_0":
            found = next(name for name in by_name if ".down_proj." in name and name.endswith("qweight"))
            wanted = tensors[f"{name}.qweight"].numpy()
            assert np.array_equal(by_name[found].reshape(wanted.shape), wanted)
        else:
            wanted = tensors[f"{name}.weight"].numpy()
            same = [value for value in by_name.values() if value.shape == wanted.T.shape]
            assert any(np.array_equal(value, wanted.T) for value in same)
