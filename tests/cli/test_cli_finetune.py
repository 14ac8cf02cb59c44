"""``olive finetune``: what it infers and refuses, that it runs as ``olive run`` does, what it imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipe_kit import lines, tones

from olive.cli import finetune as verb
from olive.cli import main
from olive.cli.main import entry
from olive.workflows import plan
from olive.workflows.recipe import METHODS

SOURCE = str(Path(main.__file__).parents[2])
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "pandas", "numpy", "peft")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_from_nothing_to_a_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("tones.jsonl", tones())
    command = [
        "finetune",
        "-m",
        "model",
        "-d",
        "tones.jsonl",
        "--max-steps",
        "2",
        "--save-config",
        "doc.json",
    ]
    assert entry([*command, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "Ready: 3 of 3 steps to run." in shown.out
    assert not (work / "olive-output").exists()
    document = json.loads(Path("doc.json").read_text(encoding="utf-8"))
    assert shown.out.startswith(json.dumps(document, indent=2))
    assert "text_template, train_on: tone answers phrase" in shown.err
    planned, from_file = plan(document), plan("doc.json")
    assert planned.steps[0].key == from_file.steps[0].key is not None

    assert entry(command) == 0
    assert (work / "olive-output" / "model" / "genai_config.json").is_file()
    run = json.loads((work / "olive-output" / "run.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in run["steps"]] == ["finetune", "merge", "export"]
    assert [score["name"] for score in run["input_scores"]][:1] == ["exact_match"]
    capsys.readouterr()

    assert [step.key for step in plan("doc.json").steps] == [step.key for step in plan(document).steps]
    assert all(step.cached for step in plan("doc.json").steps)
    assert entry(["run", "--config", "doc.json"]) == 0
    assert "every step is in the cache" in capsys.readouterr().err


def test_the_command_line_knows_the_methods_of_the_recipe() -> None:
    assert tuple(METHODS) == verb.METHODS


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metod", "lora"], "olive finetune has no option --metod; did you mean --method?"),
        (["--method", "loar"], "'loar' is not known; did you mean lora?"),
        (["--epochs", "2", "--max-steps", "2"], "--epochs and --max-steps exclude each other"),
        (["--template", "{a}", "--text-cols", "a"], "--template and --text-cols exclude each other"),
        (["--eval-data", "b.jsonl", "--eval-size", "1"], "--eval-data and --eval-size exclude each other"),
        (["--method", "full", "--r", "8"], "--r is a setting of adapters"),
        (["--method", "dpo", "--template", "{a}"], "reads the columns prompt, chosen, rejected"),
        (["--text-cols", "a,,b"], "has an empty name"),
        (["--lr", "0"], "'0' is not above 0"),
        (["--eval-size", "-1"], "--eval-size"),
        (["--seed", "1.5"], "'1.5' is no whole number from 0"),
        (["--eval-size", "40"], "nothing of 40 rows to train on"),
        (["--template", "{phrase} {tune}"], "'tune', which is no column of the data"),
        (["--text-cols", "phrase,mood"], "'mood', which is no column of the data"),
        (["--split", "test"], "has no split 'test'; it has train"),
        (["--eval-data", "none.jsonl"], "there is no file none.jsonl"),
        (["--save-config", "tones.jsonl"], "is there and is no workflow document"),
        (["--save-config", "no/such/doc.json"], "there is no folder no/such"),
    ],
)
def test_options_that_do_not_fit(
    work: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "model", "-d", "tones.jsonl", *arguments]) == 2
    assert told in said(capsys)
    assert not (work / "olive-output").exists()
    assert json.loads(Path("tones.jsonl").read_text(encoding="utf-8").splitlines()[0]) == tones()[0]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("none.jsonl", None, "there is no file none.jsonl"),
        ("empty.jsonl", "", "has no rows"),
        ("broken.json", '{"a": ', "broken.json:1"),
        ("notes.docx", "x", "notes.docx ends with .docx, which is no kind of data file"),
        ("plain", "x", "plain ends with no suffix"),
        ("head.csv", "text,label\n", "has no rows"),
        ("list.json", "[1, 2]", "is not an object"),
        ("numbers.json", '{"a": 1, "b": [2]}', "no column of text was found; the columns are a (number), b"),
        (
            "three.json",
            '{"a": "x", "b": "y", "c": "z"}',
            "--template '### A: {a}\\n### B: {b}\\n### C:\\n{c}'",
        ),
        ("which.json", '{"title": "x", "text": "y", "label": "z"}', "label is the answer, but to which"),
    ],
)
def test_data_that_does_not_do(
    work: Path, name: str, text: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path(name).write_text(text, encoding="utf-8")
    assert entry(["finetune", "-m", "model", "-d", name, "--dry-run"]) == 2
    assert told in said(capsys)


def test_a_near_name_is_suggested(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "model", "-d", "tonse.jsonl"]) == 2
    assert "did you mean tones.jsonl?" in said(capsys)


def test_folders_without_data(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("mixed/a.jsonl", tones())
    Path("mixed/b.csv").write_text("a\n1\n", encoding="utf-8")
    assert entry(["finetune", "-m", "model", "-d", "mixed"]) == 2
    assert "folder mixed holds files of several kinds: a.jsonl, b.csv" in said(capsys)
    Path("bare").mkdir()
    assert entry(["finetune", "-m", "model", "-d", "bare"]) == 2
    assert "folder bare holds no data file: nothing" in said(capsys)


def test_a_hub_dataset_is_not_read_unasked(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["finetune", "-m", "model", "-d", "someone/tones"]) == 2
    assert "Add --download to read it now" in said(capsys)


def test_a_hub_dataset_is_read_when_asked(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def load_dataset(name: str, *_: object, **settings: Any) -> list[dict[str, Any]]:
        asked.append((name, settings["split"]))
        return tones(200)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    command = ["finetune", "-m", "model", "-d", "someone/tones", "--split", "part"]
    assert entry([*command, "--download", "--dry-run", "--save-config", "doc.json"]) == 0
    assert asked == [("someone/tones", "part")]
    loads = [
        config["load_dataset_config"] for config in json.loads(Path("doc.json").read_text())["data_configs"]
    ]
    assert loads == [
        {"data_name": "someone/tones", "split": "part[:-20]"},
        {"data_name": "someone/tones", "split": "part[-20:]"},
    ]


def test_a_null_is_told_with_its_row(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tones()
    rows[3]["tone"] = None
    lines("tones.jsonl", rows)
    assert entry(["finetune", "-m", "model", "-d", "tones.jsonl"]) == 2
    assert "column 'tone' is null or missing at --data: row 3" in said(capsys)


def test_models_that_do_not_do(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "hub"))
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "someone/none", "-d", "tones.jsonl"]) == 5
    assert "--download fetches it first" in said(capsys)
    assert entry(["finetune", "-m", "./none", "-d", "tones.jsonl"]) == 2
    assert "there is no folder './none'" in said(capsys)
    Path("adapter").mkdir()
    shutil.copy("model/model.safetensors", "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    assert entry(["finetune", "-m", "adapter", "-d", "tones.jsonl"]) == 2
    assert "adapter holds an adapter, which cannot be fine-tuned" in said(capsys)


def test_the_document_is_written_as_yaml_too(work: Path) -> None:
    lines("tones.jsonl", tones())
    command = ["finetune", "-m", "model", "-d", "tones.jsonl", "--dry-run", "--save-config"]
    assert entry([*command, "doc.yaml"]) == 0
    assert entry([*command, "doc.json"]) == 0
    assert entry([*command, "doc.json"]) == 0  # ours may be written again
    assert plan("doc.yaml").steps[0].key == plan("doc.json").steps[0].key


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from olive.cli.main import entry; entry(['finetune', '--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'pydantic', 'yaml', *sys.argv[1:]}))"
    )
    started = time.perf_counter()
    done = python(code, *HEAVY)
    took = time.perf_counter() - started
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert took < 2  # 0.1 s alone; the machine may be busy


def test_inference_imports_nothing_heavy(work: Path) -> None:
    lines("tones.jsonl", tones())
    code = (
        "import sys; from olive.cli.main import entry;"
        "code = entry(['finetune', '-m', 'model', '-d', 'tones.jsonl', '--dry-run']);"
        "print(code, [m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    )
    done = python(code, *HEAVY)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
