"""``olive chat``: which prompt it makes, on a tokenizer trained here and a stubbed model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from olive.cli.main import entry

TEMPLATE = "### Text: {phrase}\n### The tone is:\n"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Echo:
    """Stands for the model: says back what it was asked, in ids."""

    context_length = 64
    asked: list[list[int]] = []
    limits: list[int] = []

    def __init__(self, folder: Path) -> None:
        Echo.asked.clear()
        Echo.limits.clear()

    def generate_batch(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        Echo.asked += prompts
        Echo.limits.append(max_new_tokens)
        return prompts


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = tmp_path / "out" / "model"
    model.mkdir(parents=True)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    (model / "genai_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("olive.models.genai.GenaiModel", Echo)
    return tmp_path / "out"


def template(output: Path, text: str | None) -> None:
    (output / "run.json").write_text(json.dumps({"prompt_template": text}), encoding="utf-8")


def test_document_template(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template(output, TEMPLATE)
    assert entry(["chat", str(output), "--prompt", "so {happy}", "--max-new-tokens", "500"]) == 0
    assert capsys.readouterr().out == "### Text: so {happy}\n### The tone is:\n"
    assert [64 - len(Echo.asked[0])] == Echo.limits


def test_template_with_two_fields(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template(output, "Q {question} in {the context}: ")
    assert entry(["chat", str(output), "--prompt", "a", "--prompt", "b"]) == 0
    assert capsys.readouterr().out == "Q a in b:\n"
    assert entry(["chat", str(output), "--prompt", "a"]) == 2
    assert "has the fields question, the context" in " ".join(capsys.readouterr().err.split())


def test_chat_template_remembers(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (output / "model" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT}), encoding="utf-8"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nmore\n"))
    assert entry(["chat", str(output)]) == 0
    assert (
        capsys.readouterr().out
        == "<user>hi\n<assistant>\n<user>hi\n<assistant><user>hi\n<assistant>\n<user>more\n<assistant>\n"
    )


def test_plain_text_and_a_model_folder(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template(output, None)
    assert entry(["chat", str(output / "model"), "--prompt", "once"]) == 0
    assert capsys.readouterr().out == "once\n"


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["chat", str(tmp_path), "--prompt", "x"]) == 2
    assert "holds no model" in capsys.readouterr().err
    assert entry(["chat", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert "there is no folder" in capsys.readouterr().err
