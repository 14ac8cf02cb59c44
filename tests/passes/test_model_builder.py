"""The exported model says what its source says; what cannot work is refused before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import context
from olive.config.workflow import Accelerator
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
    ],
)
def test_what_cannot_work_is_refused(source: Path, params: dict[str, Any], says: str) -> None:
    found = problems(source, **params)
    assert len(found) == 1
    assert found[0].startswith("error")
    assert says in found[0]


def test_an_odd_number_of_blocks_is_refused(tmp_path: Path) -> None:
    odd = tiny.tiny_phi3(tmp_path, hidden=96)
    assert any("odd number of blocks" in text for text in problems(odd, precision="int4", is_symmetric=False))
    assert problems(odd, precision="int4") == []


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
