"""Our integers in other tools' formats, held against the specification and against other readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foreign_kit import Stored, tensors_of
from olive.config.gates import IntegersGate, ParityGate
from olive.config.workflow import Accelerator
from olive.engine.gates import integers, parity
from olive.errors import PassFailed, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe, load_model
from olive.models.quantised import layer_of
from olive.passes.base import PassContext
from olive.passes.registry import resolve
from olive.quantization.packing import unpack
from tiny import tiny_llama
from training_kit import context, data, rows

FORMATS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
PROMPTS = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]
KINDS = {"compressed-tensors": "pack-quantized"}


def artifact(folder: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=folder, digest="0" * 64)


def run(name: str, source: Path, folder: Path, **params: Any) -> PassContext:
    folder.mkdir(parents=True, exist_ok=True)
    technique = resolve(name)
    ctx = context(folder, data(rows(folder)))
    technique().run(artifact(source), technique.Params.model_validate(params), ctx)
    technique().ensure(ctx.out)
    return ctx


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return tiny_llama(
        folder, initializer_range=0.2, tie_word_embeddings=False, intermediate_size=192, num_key_value_heads=4
    )


@pytest.fixture(
    scope="module", params=[(4, 32, False), (4, 32, True), (8, 64, False), (4, -1, False)], ids=str
)
def source(request: pytest.FixtureRequest, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bits, group, sym = request.param
    folder = tmp_path_factory.mktemp("ours")
    return run("Rtn", plain, folder, bits=bits, group_size=group, sym=sym).out


def allowed(form: str, source: Path) -> bool:
    settings = json.loads((source / "config.json").read_text())["quantization_config"]
    return form != "awq" or (settings["bits"] == 4 and settings["group_size"] > 0)


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_the_specification(source: Path, tmp_path: Path, form: str) -> None:
    """Tensors equal those of packers that share no code with the product; both gates hold."""
    if not allowed(form, source):
        with pytest.raises(PassFailed, match="awq stores 4 bits in groups"):
            run("SaveQuantized", source, tmp_path, format=form)
        return
    ctx = run("SaveQuantized", source, tmp_path, format=form)
    made, given = load_file(ctx.out / "model.safetensors"), load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for name in (name.removesuffix(".qweight") for name in given if name.endswith(".qweight")):
        layer = layer_of(config, name)
        packed, scales = given[f"{name}.qweight"], given[f"{name}.scales"].half()
        codes = unpack(packed, layer.bits, packed.shape[1] * 8 // layer.bits)
        zeros = torch.full(scales.shape, 2 ** (layer.bits - 1))
        if not layer.symmetric:
            zeros = unpack(given[f"{name}.qzeros"], layer.bits, scales.shape[1])
        one = Stored(layer.bits, codes.numpy(), zeros.numpy().astype(np.int64), scales.numpy())
        wanted = tensors_of(KINDS.get(form, form), name, one, sym=layer.symmetric)
        for key, value in wanted.items():
            assert torch.equal(made.pop(key), torch.from_numpy(np.ascontiguousarray(value))), key
    assert all(torch.equal(value, given[name]) for name, value in made.items())  # and nothing else
    held = integers.check(artifact(source), ctx.out, IntegersGate(), ctx)
    assert held.figures["layers"] == 14
    assert held.figures["scale_error"] < 2**-10
    before = load_model(source, dtype="float32")(torch.tensor([PROMPTS[0]])).logits
    after = load_model(ctx.out, dtype="float32")(torch.tensor([PROMPTS[0]])).logits
    assert float((before - after).abs().max()) < 5e-3 * float(before.std())  # scales in float16
    assert parity.check(artifact(source), ctx.out, ParityGate(), ctx, PROMPTS).figures["kl"] < 1e-5


def test_scales_in_float32_change_nothing(plain: Path, tmp_path: Path) -> None:
    ours = run("KQuant", plain, tmp_path / "ours")
    ctx = run("SaveQuantized", ours.out, tmp_path, format="gptq", scale_dtype="float32")
    assert integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx).figures["scale_error"] == 0


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_compressed_tensors_itself_loads_it(plain: Path, tmp_path: Path, sym: bool) -> None:
    """transformers with the compressed-tensors package gives the logits of our own reader.

    Its two ways to load take one each: layers of different bits, and zero points (it expands those as if all
    layers had the bits of the first).
    """
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    overrides = {"*.down_proj": {"bits": 8}} if sym else {}
    options = {} if sym else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    ours = run("Rtn", plain, tmp_path / "ours", sym=sym, overrides=overrides)
    # it expands in the dtype of the scales
    ctx = run("SaveQuantized", ours.out, tmp_path, format="compressed-tensors", scale_dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(ctx.out, dtype=torch.float32, **options)
    with torch.no_grad():
        found = model(torch.tensor([PROMPTS[0]])).logits
        wanted = load_model(ctx.out, dtype="float32")(torch.tensor([PROMPTS[0]])).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.std())


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_the_loader_of_onnxruntime_genai_reads_the_same_integers(
    plain: Path, tmp_path: Path, form: str
) -> None:
    """Its loaders unpack, expand and round again; where they end is what was quantised."""
    from onnxruntime_genai.models.loaders.quant_model import QuantModel

    ours = run("Rtn", plain, tmp_path / "ours")
    ctx = run("SaveQuantized", ours.out, tmp_path, format=form)
    given = load_file(ours.out / "model.safetensors")
    settings = json.loads((ctx.out / "config.json").read_text())["quantization_config"]
    loaded = QuantModel.from_pretrained(
        form,
        input_path=str(ctx.out),
        quant_attrs={"config": settings, "use_g_idx": False},
        q_size=64,
        kv_size=64,
        intermediate_size=192,
        num_layers=2,
    )
    for number, layer in enumerate(loaded.layers):
        for part, name in (
            (layer.self_attn.o_proj, "self_attn.o_proj"),
            (layer.mlp.down_proj, "mlp.down_proj"),
        ):
            place = f"model.layers.{number}.{name}"
            packed, zeros = given[f"{place}.qweight"], given[f"{place}.qzeros"]
            assert torch.equal(part.qweight.reshape(packed.shape), packed)
            assert torch.equal(part.qzeros.reshape(zeros.shape), zeros)


def test_a_head_that_is_the_embedding_is_expanded(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "tied", initializer_range=0.2)
    ours = run("Rtn", source, tmp_path / "ours", lm_head=True, overrides={"lm_head": {"bits": 8}})
    ctx = run("SaveQuantized", ours.out, tmp_path, format="gptq")
    assert ctx.facts["expanded"] == ["lm_head"]
    integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx)
    one, other = load_model(ours.out, dtype="float32"), load_model(ctx.out, dtype="float32")
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_a_head_of_its_own_stays_integers(plain: Path, tmp_path: Path) -> None:
    ours = run("Rtn", plain, tmp_path / "ours", lm_head=True, overrides={"lm_head": {"bits": 8}})
    ctx = run("SaveQuantized", ours.out, tmp_path, format="gptq")
    settings = json.loads((ctx.out / "config.json").read_text())["quantization_config"]
    assert settings["lm_head"] is True
    assert settings["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": 32}}
    assert integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx).figures["layers"] == 15


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_the_gate_finds_one_wrong_bit(plain: Path, tmp_path: Path, part: str) -> None:
    ours = run("Rtn", plain, tmp_path / "ours")
    ctx = run("SaveQuantized", ours.out, tmp_path, format="gptq")
    tensors = load_file(ctx.out / "model.safetensors")
    value = tensors[f"model.layers.1.mlp.down_proj.{part}"]
    value[1, 3] = value[1, 3] * 1.01 if part == "scales" else value[1, 3] ^ 1
    save_file(tensors, ctx.out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PassFailed, match=r"model\.layers\.1\.mlp\.down_proj"):
        integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx)


def test_scales_that_float16_cannot_hold_are_found(plain: Path, tmp_path: Path) -> None:
    ours = run("Rtn", plain, tmp_path / "ours")
    tensors = load_file(ours.out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = 1e6
    save_file(tensors, ours.out / "model.safetensors", metadata={"format": "pt"})
    ctx = context(tmp_path, data(rows(tmp_path)))
    technique = resolve("SaveQuantized")
    technique().run(artifact(ours.out), technique.Params.model_validate({"format": "gptq"}), ctx)
    with pytest.raises(PassFailed, match="up_proj has scales that are NaN or infinite"):
        integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx)


def test_zero_points_of_zero_are_told(plain: Path, tmp_path: Path) -> None:
    ours = run("Rtn", plain, tmp_path / "ours")
    tensors = load_file(ours.out / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"][0, 0] = 0
    save_file(tensors, ours.out / "model.safetensors", metadata={"format": "pt"})
    ctx = run("SaveQuantized", ours.out, tmp_path, format="gptq")
    assert ctx.facts["zero_points_of_zero"] >= 2
    assert "gptq_v2" in ctx.progress.notes[0]  # type: ignore[attr-defined]
    integers.check(artifact(ours.out), ctx.out, IntegersGate(), ctx)


def test_a_foreign_model_is_saved_in_another_format(plain: Path, tmp_path: Path) -> None:
    ours = run("Rtn", plain, tmp_path / "ours")
    one = run("SaveQuantized", ours.out, tmp_path / "one", format="gptq", scale_dtype="float32")
    two = run("SaveQuantized", one.out, tmp_path / "two", format="awq", scale_dtype="float32")
    assert integers.check(artifact(ours.out), two.out, IntegersGate(), two).figures["scale_error"] == 0


def test_what_a_format_cannot_store_is_told_at_plan(plain: Path, tmp_path: Path) -> None:
    technique, kquant = resolve("SaveQuantized"), resolve("KQuant")
    params = technique.Params.model_validate({"format": "awq"})
    for settings in ({"bits": 8}, {"group_size": -1}, {"overrides": {"*.down_proj": {"bits": 8}}}):
        found = list(technique().check_settings(params, kquant.Params.model_validate(settings)))
        assert "awq stores 4 bits" in found[0].message
    head = kquant.Params.model_validate({"lm_head": True, "overrides": {"lm_head": {"bits": 8}}})
    assert not list(technique().check_settings(params, head))
    ours = run("Rtn", plain, tmp_path / "ours", bits=8)
    accelerator = Accelerator(device="cpu", execution_providers=("CPUExecutionProvider",))
    found = list(technique().check(describe(ours.out), params, probe(), accelerator))
    assert found[0].severity is Severity.ERROR
