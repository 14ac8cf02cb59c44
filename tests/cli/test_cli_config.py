"""``olive config migrate`` and ``schema``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olive.cli.main import entry

OLD = {
    "input_model": {
        "type": "PyTorchModel",
        "config": {"hf_config": {"model_name": "some/model", "task": "text-generation"}},
    },
    "passes": {"builder": {"type": "ModelBuilder", "config": {"precision": "int4"}}},
    "engine": {"output_dir": "out"},
}


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_migrated_document_needs_no_more_rewriting(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old.json", tmp_path / f"new{suffix}"
    old.write_text(json.dumps(OLD), encoding="utf-8")
    assert entry(["config", "migrate", str(old), "-o", str(new)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is now `HfModel`" in captured.err
    assert entry(["config", "migrate", str(new)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == new.read_text(encoding="utf-8") if suffix == ".json" else "HfModel" in captured.out


def test_a_misspelt_key_names_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "document.json"
    file.write_text('{\n "input_model": {"type": "HfModel", "model_pth": "x"}\n}', encoding="utf-8")
    assert entry(["run", str(file)]) == 2
    told = capsys.readouterr().err
    assert "document.json:2: $.input_model" in told
    assert "did you mean `model_path`?" in told


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("olive.config.schema")
    assert entry(["config", "schema"]) == 0
    assert "passes" in json.loads(capsys.readouterr().out)["properties"]
