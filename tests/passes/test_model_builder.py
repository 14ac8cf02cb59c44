"""The exported model says what its source says; what cannot work is refused before anything runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import context
from olive.config.workflow import Accelerator
from olive.errors import EnvironmentFault, PassFailed, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe, load_model
from olive.passes.export.model_builder import ModelBuilder

IDS = [11, 52, 97, 200, 33, 64, 120, 7]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(tmp_path_factory.mktemp("source"), hidden=128)


def export(source: Path, folder: Path, **params: Any) -> Path:
    ctx = context(folder)
    wanted = ModelBuilder.Params.model_validate(params)
    ModelBuilder().run(Artifact(kind=Kind.HF, path=source, digest="0" * 64), wanted, ctx)
    ModelBuilder().ensure(ctx.out)
    assert ctx.attributes["precision"] == params["precision"]
    return ctx.out


def logits(folder: Path) -> Any:
    """Logits of the last position by onnxruntime-genai."""
    import numpy
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=32)
    generator = genai.Generator(model, settings)
    generator.append_tokens(numpy.array(IDS, dtype=numpy.int32))
    return numpy.array(generator.get_output("logits"))[0, -1]


# largest difference of a logit, as a share of the largest logit
@pytest.mark.parametrize(
    ("params", "tolerance"),
    [
        ({"precision": "fp32"}, 1e-4),
        ({"precision": "int8"}, 0.02),
        ({"precision": "int4"}, 0.15),
        ({"precision": "int4", "algo_config": "k_quant_mixed"}, 0.12),
        ({"precision": "int4", "is_symmetric": False, "block_size": 16}, 0.15),
    ],
    ids=str,
)
def test_logits_are_those_of_the_source(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], params: dict[str, Any], tolerance: float
) -> None:
    import torch

    out = export(source, tmp_path, **params)
    assert capfd.readouterr() == ("", "")
    with torch.inference_mode():
        wanted = load_model(source, dtype="float32")(input_ids=torch.tensor([IDS])).logits[0, -1].numpy()
    found = logits(out)
    assert abs(found - wanted).max() <= tolerance * abs(wanted).max()
    assert abs(found - wanted).max() > 0
    for path in out.rglob("*"):
        assert not path.is_symlink()
    assert str(source) not in (out / "genai_config.json").read_text()


def test_a_llama_with_a_head_of_its_own(tmp_path: Path) -> None:
    import torch

    llama = tiny.tiny_llama(tmp_path / "llama", hidden=128, tie_word_embeddings=False)
    out = export(llama, tmp_path / "run", precision="int4")
    with torch.inference_mode():
        wanted = load_model(llama, dtype="float32")(input_ids=torch.tensor([IDS])).logits[0, -1].numpy()
    assert abs(logits(out) - wanted).max() <= 0.15 * abs(wanted).max()


def test_the_folder_holds_the_tokenizer_of_the_source(source: Path, tmp_path: Path) -> None:
    endless = shutil.copytree(source, tmp_path / "source")
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**30}))
    out = export(endless, tmp_path / "run", precision="fp32")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert not (out / ".builder").exists()


def test_a_failing_builder_says_what_it_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from onnxruntime_genai.models import builder

    def fail(*_: Any, **__: Any) -> None:
        print("reading the weights of layer 3")
        os.write(2, b"10%\r50%\rnative trouble\n")
        logging.basicConfig()
        raise RuntimeError("odd shape")

    monkeypatch.setattr(builder, "create_model", fail)
    handlers = logging.getLogger().handlers[:]
    with pytest.raises(PassFailed, match="RuntimeError: odd shape") as caught:
        export(source, tmp_path, precision="fp32")
    problem = caught.value.problems[0]
    assert problem.message.endswith("reading the weights of layer 3\nnative trouble")
    assert problem.where == "ModelBuilder"
    assert problem.fix
    assert logging.getLogger().handlers == handlers
    assert capfd.readouterr() == ("", "")


def test_a_builder_that_does_not_import_is_the_environments_fault(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models.builder", None)
    with pytest.raises(EnvironmentFault, match="does not load"):
        export(source, tmp_path, precision="fp32")


def test_int4_is_smaller(source: Path, tmp_path: Path) -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.onnx*"))

    whole = size(export(source, tmp_path / "a", precision="fp32"))
    assert size(export(source, tmp_path / "b", precision="int4")) < whole / 3


def test_search_defaults_are_written(source: Path, tmp_path: Path) -> None:
    out = export(source, tmp_path, precision="fp32", search={"top_k": 7})
    assert json.loads((out / "genai_config.json").read_text())["search"]["top_k"] == 7


def problems(source: Path, provider: str = "CPUExecutionProvider", **params: Any) -> list[str]:
    accelerator = Accelerator.model_validate({"device": "cpu", "execution_providers": [provider]})
    found = ModelBuilder().check(
        describe(source), ModelBuilder.Params.model_validate(params), probe(), accelerator
    )
    return [f"{problem.severity.value} {problem.message} {problem.fix}" for problem in found]


def test_a_sound_document_has_no_problem(source: Path) -> None:
    assert problems(source, precision="int4") == []


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"precision": "fp16"}, "fp32, int8, int4"),
        ({"precision": "int4", "extra_options": {"int4_block_sise": 32}}, "block_size"),
        ({"precision": "int4", "extra_options": {"hf_token": "secret"}}, "secret does not belong"),
        ({"precision": "int4", "extra_options": {"config_only": True}}, "writes no model"),
        ({"precision": "int4", "extra_options": {"int4_block_size": 32}}, "beside precision"),
        ({"precision": "int4", "extra_options": {"hf_remote": True}}, "runs code"),
        ({"precision": "int4", "extra_options": {"adapter_path": "a"}}, "MergeAdapterWeights"),
        ({"precision": "int4", "search": {"top_q": 1}}, "Did you mean top_"),
        ({"precision": "bf16"}, "fp32, int8, int4"),
    ],
)
def test_what_cannot_work_is_refused(source: Path, params: dict[str, Any], says: str) -> None:
    found = problems(source, **params)
    assert len(found) == 1
    assert found[0].startswith("error")
    assert says in found[0]


def test_a_newer_runtime_may_know_more_generation_settings(source: Path) -> None:
    machine = probe()
    newer = machine.model_copy(update={"packages": machine.packages | {"onnxruntime-genai": "9.0"}})
    wanted = ModelBuilder.Params.model_validate({"precision": "int4", "search": {"top_q": 1}})
    (problem,) = ModelBuilder().check(describe(source), wanted, newer, Accelerator())
    assert problem.severity is Severity.WARNING


@pytest.mark.parametrize(
    ("provider", "precision", "sound"),
    [
        ("CPUExecutionProvider", "int8", True),
        ("CUDAExecutionProvider", "fp16", True),
        ("DmlExecutionProvider", "fp32", False),
        ("WebGpuExecutionProvider", "bf16", False),
        ("QNNExecutionProvider", "int4", False),
    ],
)
def test_precision_and_provider(source: Path, provider: str, precision: str, sound: bool) -> None:
    found = problems(source, provider, precision=precision)
    assert (found == []) is sound
    assert all("Use one of" in text for text in found)


def test_an_architecture_that_the_builder_does_not_know(source: Path, tmp_path: Path) -> None:
    odd = shutil.copytree(source, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"architectures": ["AcmeForCausalLM"]}))
    assert any("architecture 'AcmeForCausalLM'" in text for text in problems(odd, precision="fp32"))


def test_settings_without_effect_are_noted(source: Path) -> None:
    (found,) = problems(source, precision="fp32", block_size=16)
    assert found.startswith("note block_size only matter")


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "params", [{"algo_config": "rtn", "is_symmetric": False}, {"algo_config": "k_quant"}]
)
def test_an_odd_number_of_blocks(tmp_path: Path, params: dict[str, Any], tie: bool) -> None:
    """Rows of 96 weights have 3 blocks, which the builder's own rtn and k_quant cannot pack."""
    import torch

    heads = {"num_attention_heads": 6, "tie_word_embeddings": tie}
    odd = tiny.tiny_llama(tmp_path / "odd", hidden=96, **heads)
    assert problems(odd, precision="int4", **params) == []
    out = export(odd, tmp_path / "run", precision="int4", **params)
    with torch.inference_mode():
        wanted = load_model(odd, dtype="float32")(input_ids=torch.tensor([IDS])).logits[0, -1].numpy()
    assert abs(logits(out) - wanted).max() <= 0.2 * abs(wanted).max()


@pytest.mark.parametrize(
    ("packages", "says"),
    [({"onnxruntime-genai": "0.13.2"}, "too old"), ({"onnxruntime-genai": None}, "not installed")],
)
def test_packages_that_cannot_work_are_refused(
    source: Path, packages: dict[str, str | None], says: str
) -> None:
    machine = probe()
    merged = {k: v for k, v in (machine.packages | packages).items() if v is not None}
    changed = machine.model_copy(update={"packages": merged})
    wanted = ModelBuilder.Params.model_validate({"precision": "int4"})
    found = list(ModelBuilder().check(describe(source), wanted, changed, Accelerator()))
    assert any(says in problem.message and problem.exit_code == 5 for problem in found)
