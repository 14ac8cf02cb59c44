"""What lands in the output folder: whole, escaped, without secrets, without a request to anywhere."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sample_result as fake

from olive.engine.result import Finding, RunResult
from olive.errors import EnvironmentFault
from olive.models.artifact import Kind
from olive.report.write import FILES, write

NASTY = '<script>alert("x")</script> & `code` | [a](javascript:b) {{ 7*7 }} {% x %}'
TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not set(self.open) & {"script", "style"}:
            self.text += data


def page(result: RunResult, folder: Path) -> Page:
    write(result, folder)
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_files_and_their_figures(tmp_path: Path) -> None:
    found = page(fake.result(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    text = " ".join(found.text.split())
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for figure in ("0.004", "0.929", "538 MB", "121 MB", "2.1e-08", "at most 1e-06", "at least 0.7"):
        assert figure in text, figure
        assert figure in card, figure
    for figure in ("from the cache", "7 min 11 s", "loss (nat a token)", "training step", "2.13.0"):
        assert figure in text, figure
    assert text.startswith("phi-3-mini, fine-tuned with LoRA, merged and exported to int4 ONNX")
    assert 'og.Model("model")' in card
    assert "{phrase}" in card


def test_run_json_reads_back(tmp_path: Path) -> None:
    result = fake.result(output_dir=str(tmp_path / "elsewhere"))
    write(result, tmp_path)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert RunResult.model_validate_json(text) == result.model_copy(update={"output_dir": "."})


def test_nothing_is_requested_from_anywhere(tmp_path: Path) -> None:
    found = page(fake.result(), tmp_path)
    for tag, attributes in found.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
        assert not attributes.keys() & {"src", "href", "srcset", "action", "data"}, (tag, attributes)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_everything_is_escaped(tmp_path: Path) -> None:
    base = fake.result()
    steps = tuple(
        step.model_copy(
            update={
                "name": NASTY,
                "facts": {NASTY: NASTY},
                "gates": tuple(gate.model_copy(update={"text": NASTY}) for gate in step.gates),
                "scores": tuple(score.model_copy(update={"metric": NASTY}) for score in step.scores),
            }
        )
        for step in base.steps
    )
    result = fake.result(
        steps=steps,
        document={"input_model": {"model_path": NASTY}, "x": NASTY},
        findings=(Finding(severity="note", message=NASTY, where=NASTY, fix=NASTY),),
        machine={"cpu": NASTY, "cores": 2},
        versions={NASTY: NASTY},
        prompt_template=NASTY,
        sample={"prompt": NASTY, "completion": NASTY},
    )
    found = page(result, tmp_path)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert '<script>alert("x")</script>' in found.text
    assert "49" not in found.text
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.S | re.M)
    assert "<script>" not in outside.replace(r"\<script\>", "")
    assert "[a](" not in outside


def test_a_sample_cannot_break_out_of_its_fence(tmp_path: Path) -> None:
    write(fake.result(sample={"prompt": "a\n```\n# not a heading\n", "completion": "b"}), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "````text\na\n```\n# not a heading\nb\n````" in card


def test_secrets_reach_no_file(tmp_path: Path) -> None:
    document = {
        "input_model": {
            "model_path": f"https://someone:{'p4ss' * 3}@host/model",
            "load_kwargs": {"hf_token": "plain-words"},
        },
        "password": "p4ss" * 3,
        "hf_token": True,
        "nested": [{"client_secret": "p4ss" * 3, "note": f"use {TOKEN} here"}],
        "eos_token": "<|end|>",
        "max_new_tokens": 8,
        "api_key": "$MY_KEY",
    }
    result = fake.result(
        document=document,
        findings=(Finding(severity="note", message=f"logged in with {TOKEN}", fix=f"password={'p4ss' * 3}"),),
        sample={"prompt": f"my token is {TOKEN}", "completion": ""},
    )
    write(result, tmp_path)
    for name in FILES:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert TOKEN not in text, name
        assert "p4ss" not in text, name
        assert "plain-words" not in text, name
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["document"]
    assert (kept["eos_token"], kept["max_new_tokens"], kept["hf_token"], kept["api_key"]) == (
        "<|end|>",
        8,
        True,
        "$MY_KEY",
    )


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_says_how_it_loads(kind: Kind, tmp_path: Path) -> None:
    last = fake.result().steps[-1].model_copy(update={"kind": kind})
    page(fake.result(steps=(last,)), tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)\n```", card, re.S)
    assert code is not None
    assert len(code[1].splitlines()) == 3
    compile(code[1], "card", "exec")


def test_bare_result(tmp_path: Path) -> None:
    """No scores, curves, gates, data or steps at all."""
    result = fake.result(
        steps=(),
        input_scores=(),
        findings=(),
        versions={},
        machine={},
        prompt_template=None,
        sample=None,
        input_size=0,
    )
    text = page(result, tmp_path).text
    assert "as it came" in text
    assert "Gates" not in text


def test_not_a_number_stays_json(tmp_path: Path) -> None:
    base = fake.result()
    broken = [{"step": 1.0, "loss": float("nan")}, {"step": 2.0, "loss": float("inf")}]
    page(fake.result(steps=(base.steps[0].model_copy(update={"series": {"loss": broken}}),)), tmp_path)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert json.loads(text)["steps"][0]["series"]["loss"][0]["loss"] is None


def test_same_result_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(fake.result(), tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_that_refuses_is_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        write(fake.result(), tmp_path / "file")


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(fake.result(), tmp_path)
    before = (tmp_path / "run.json").read_bytes()

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(EnvironmentFault, match="No space left"):
        write(fake.result(tool="other"), tmp_path)
    assert (tmp_path / "run.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
