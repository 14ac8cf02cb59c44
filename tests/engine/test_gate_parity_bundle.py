"""The parity and bundle gates pass a good export and catch a broken one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import context
from olive.config.workflow import BundleGate, ParityGate
from olive.engine.gates import bundle, parity
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.export.model_builder import ModelBuilder

PROMPTS = [[11, 52, 97, 200, 33, 64, 120, 7], [9, 250, 31, 77]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(
        tmp_path_factory.mktemp("source"), hidden=128, initializer_range=0.2, tie_word_embeddings=False
    )


def export(source: Path, folder: Path) -> Path:
    ctx = context(folder)
    wanted = ModelBuilder.Params.model_validate({"precision": "fp32"})
    ModelBuilder().run(artifact(source), wanted, ctx)
    return ctx.out


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("export"))


def artifact(folder: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=folder, digest="0" * 64)


def check_parity(source: Path, exported: Path, tmp_path: Path, **settings: Any) -> GateResult:
    ctx = context(tmp_path / "parity")
    ctx.attributes["precision"] = "fp32"
    return parity.check(artifact(source), exported, ParityGate(**settings), ctx, PROMPTS)


def check_bundle(exported: Path, tmp_path: Path) -> GateResult:
    return bundle.check(artifact(exported), exported, BundleGate(), context(tmp_path / "bundle"), PROMPTS)


def broken(source: Path, folder: Path, change: Any) -> Path:
    """An export of ``source`` with its head changed."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(source, folder / "source")
    tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return export(copy, folder / "export")


def test_a_good_export_passes_parity(source: Path, exported: Path, tmp_path: Path) -> None:
    result = check_parity(source, exported, tmp_path)
    assert result.passed
    assert result.figures["kl"] < 1e-4
    assert result.figures["top1"] == 1
    assert result.figures["positions"] == sum(map(len, PROMPTS))
    assert result.figures["same_answer"] == 1


def test_the_document_can_ask_for_more(source: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"parity gate: KL.*precision fp32"):
        check_parity(source, exported, tmp_path, max_kl=1e-15)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda head: head * float("nan"), "NaN or infinity"),
        (lambda head: head * 0, "flat logits"),
        (lambda head: head.roll(1, 0), "KL"),
    ],
)
def test_a_broken_export_fails_parity(source: Path, tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(PassFailed, match=says) as caught:
        check_parity(source, broken(source, tmp_path, change), tmp_path)
    assert caught.value.problems[0].fix


def test_another_model_fails_parity(exported: Path, tmp_path: Path) -> None:
    other = tiny.tiny_phi3(
        tmp_path / "other", hidden=128, initializer_range=0.2, tie_word_embeddings=False, seed=3
    )
    with pytest.raises(PassFailed, match="KL"):
        check_parity(other, exported, tmp_path)


def test_a_good_folder_passes_the_bundle_gate(exported: Path, tmp_path: Path) -> None:
    result = check_bundle(exported, tmp_path)
    assert result.passed
    assert 1 <= result.figures["tokens"] <= bundle.NEW_TOKENS


def missing_weights(folder: Path) -> None:
    next(folder.glob("*.onnx.data")).unlink()


def broken_config(folder: Path) -> None:
    (folder / "genai_config.json").write_text("{")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def other_decoder(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "absent.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))


def outside(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "../model.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))


def linked(folder: Path) -> None:
    path = next(folder.glob("*.onnx.data"))
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    "damage", [missing_weights, broken_config, no_tokenizer, other_decoder, outside, linked]
)
def test_a_damaged_folder_fails_the_bundle_gate(exported: Path, tmp_path: Path, damage: Any) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    damage(folder)
    with pytest.raises(PassFailed, match="bundle gate") as caught:
        check_bundle(folder, tmp_path)
    problem = caught.value.problems[0]
    assert problem.fix
    assert problem.where == "ModelBuilder"
