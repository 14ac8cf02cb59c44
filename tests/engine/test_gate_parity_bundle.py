"""The parity and bundle gates pass a good export and catch a broken one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import context
from olive.config.gates import BundleGate, ParityGate
from olive.engine.gates import bundle, compare, parity
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


def with_head(source: Path, folder: Path, change: Any) -> Path:
    """A copy of ``source`` with its head changed."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(source, folder / "source")
    tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
    tensors["lm_head.weight"] = change(tensors["lm_head.weight"])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def broken(source: Path, folder: Path, change: Any) -> Path:
    """An export of ``source`` with its head changed."""
    return export(with_head(source, folder, change), folder / "export")


def test_a_good_export_passes_parity(source: Path, exported: Path, tmp_path: Path) -> None:
    result = check_parity(source, exported, tmp_path)
    assert result.passed
    assert result.figures["kl"] < 1e-4
    assert result.figures["top1"] == 1
    assert result.figures["positions"] == sum(map(len, PROMPTS))


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


def test_a_source_of_another_vocabulary_fails_parity(exported: Path, tmp_path: Path) -> None:
    other = tiny.tiny_phi3(tmp_path / "other", hidden=128, vocab_size=500)
    with pytest.raises(PassFailed, match="vocabulary of 384, its source of 500"):
        check_parity(other, exported, tmp_path)


def test_a_broken_source_is_not_blamed_on_the_export(source: Path, exported: Path, tmp_path: Path) -> None:
    copy = with_head(source, tmp_path, lambda head: head * float("nan"))
    with pytest.raises(PassFailed, match="the source model itself gives NaN"):
        check_parity(copy, exported, tmp_path)


def test_an_answer_stuck_on_one_token_fails_parity(
    source: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a broken key-value cache, which the logits of the prompts do not show."""
    run = parity._Runtime._run

    def stuck(self: Any, ids: list[int], seen: int, past: Any) -> Any:
        values = run(self, ids, seen, past)
        if seen:
            values[self._logits][..., 77] = 1e3
        return values

    monkeypatch.setattr(parity._Runtime, "_run", stuck)
    with pytest.raises(PassFailed, match="repeats token 77 and its source does not"):
        check_parity(source, exported, tmp_path)


def test_a_model_that_gives_the_last_position_alone(
    source: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parity._Runtime.logits
    monkeypatch.setattr(parity._Runtime, "logits", lambda self, ids: whole(self, ids)[-1:])
    result = check_parity(source, exported, tmp_path)
    assert result.figures["positions"] == len(PROMPTS)
    assert result.figures["top1"] == 1


def test_without_prompts_random_tokens_are_compared(source: Path, exported: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path / "parity")
    result = parity.check(artifact(source), exported, ParityGate(), ctx, [])
    assert result.figures["positions"] == 4 * 24


def test_reference_logits_have_a_budget(
    source: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_KEPT", 4 * 384 * len(PROMPTS) * 3)
    monkeypatch.setattr(compare, "_CELLS", 384)
    result = check_parity(source, exported, tmp_path)
    assert result.figures["positions"] == 3 * len(PROMPTS)
    assert result.figures["kl"] < 1e-4


@pytest.mark.parametrize("damage", ["weights", "config", "decoder"])
def test_parity_of_a_damaged_folder(source: Path, exported: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    {"weights": missing_weights, "config": no_decoder, "decoder": other_decoder}[damage](folder)
    with pytest.raises(PassFailed, match="parity gate: the exported model does not") as caught:
        check_parity(source, folder, tmp_path)
    assert caught.value.problems[0].where == "ModelBuilder"
    assert caught.value.problems[0].fix


def test_distances_against_a_plain_computation() -> None:
    import torch

    torch.manual_seed(0)
    p, q = torch.randn(5, 7), torch.randn(5, 7)
    q[3, 2] = float("inf")
    found = compare.compare([p], [q])
    good = [0, 1, 2, 4]
    kl = torch.nn.functional.kl_div(
        q[good].log_softmax(-1), p[good].log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    assert (found.positions, found.bad) == (5, 1)
    assert found.agreed == int((p[good].argmax(-1) == q[good].argmax(-1)).sum())
    flat = compare.compare([torch.zeros(2, 7)], [torch.zeros(2, 7)])
    assert (flat.flatness(0), flat.flatness(1)) == pytest.approx((1, 1))


def test_a_good_folder_passes_the_bundle_gate(exported: Path, tmp_path: Path) -> None:
    result = check_bundle(exported, tmp_path)
    assert result.passed
    assert 1 <= result.figures["tokens"] <= bundle.NEW_TOKENS


def missing_weights(folder: Path) -> None:
    next(folder.glob("*.onnx.data")).unlink()


def broken_config(folder: Path) -> None:
    (folder / "genai_config.json").write_text("{")


def no_decoder(folder: Path) -> None:
    (folder / "genai_config.json").write_text('{"model": {"vocab_size": 384}}')


def a_list(folder: Path) -> None:
    (folder / "genai_config.json").write_text("[]")


def no_vocabulary(folder: Path) -> None:
    (folder / "genai_config.json").write_text('{"model": {}}')


def cut_weights(folder: Path) -> None:
    path = next(folder.glob("*.onnx.data"))
    path.write_bytes(path.read_bytes()[:1000])


def absolute(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = str(folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(config))


def hard_linked(folder: Path) -> None:
    path = next(folder.glob("*.onnx.data"))
    (folder.parent / "elsewhere").hardlink_to(path)


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
    "damage",
    [
        missing_weights,
        cut_weights,
        broken_config,
        no_decoder,
        a_list,
        no_vocabulary,
        no_tokenizer,
        other_decoder,
        outside,
        absolute,
        linked,
        hard_linked,
    ],
)
def test_a_damaged_folder_fails_the_bundle_gate(exported: Path, tmp_path: Path, damage: Any) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    damage(folder)
    with pytest.raises(PassFailed, match="bundle gate") as caught:
        check_bundle(folder, tmp_path)
    problem = caught.value.problems[0]
    assert problem.fix
    assert problem.where == "ModelBuilder"
    assert len(problem.message.splitlines()) <= 14


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Put another program in the place of the clean process's."""
    path = tmp_path / "program.py"
    path.write_text(f"import json, os, signal, sys, time\nrequest = json.load(sys.stdin)\n{text}\n")
    monkeypatch.setattr(bundle.generate_once, "__file__", str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11, SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9, SIGKILL"),
        ("sys.exit('no such operator')", r"exit 1\):\nno such operator"),
        ("print('hello')", "answer is not readable"),
        ("pass", "answer is not readable"),
        ("print(json.dumps({'ids': [], 'text': '', 'seconds': 0, 'load_seconds': 0}))", r"generated \[\]"),
        ("print(json.dumps({'ids': [9999], 'text': '', 'seconds': 0, 'load_seconds': 0}))", "9999"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_how_the_clean_process_ended_is_told(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    program(tmp_path, monkeypatch, text)
    with pytest.raises(PassFailed, match=f"bundle gate: (?s:.*){says}") as caught:
        check_bundle(exported, tmp_path)
    assert caught.value.problems[0].where == "ModelBuilder"
    assert caught.value.problems[0].fix


def test_a_process_that_hangs_is_ended(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(bundle, "_SECONDS", 0.2)
    with pytest.raises(PassFailed, match="no answer within"):
        check_bundle(exported, tmp_path)


def test_the_clean_process_has_the_runtime_alone(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither this package nor torch nor transformers: who has only the runtime can run the folder."""
    text = Path(bundle.generate_once.__file__).read_text(encoding="utf-8")
    path = tmp_path / "program.py"
    path.write_text(
        text
        + "    heavy = {'olive', 'torch', 'transformers', 'onnx'} & set(sys.modules)\n"
        + "    assert not heavy, heavy\n"
        + "    import os\n    assert os.listdir() == [], os.listdir()\n"
    )
    monkeypatch.setattr(bundle.generate_once, "__file__", str(path))
    assert check_bundle(exported, tmp_path).passed


def test_a_prompt_longer_than_the_context_is_cut(tmp_path: Path) -> None:
    short = tiny.tiny_llama(tmp_path / "short", hidden=128, max_position_embeddings=32)
    folder = export(short, tmp_path / "run")
    result = bundle.check(
        artifact(short), folder, BundleGate(), context(tmp_path / "bundle"), [list(range(10, 110))]
    )
    assert 1 <= result.figures["tokens"] <= bundle.NEW_TOKENS
