"""Rotate, quantise, export: one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

from tiny import tiny_phi3

TEXT = {
    "name": "text",
    "type": "HuggingfaceContainer",
    "load_dataset_config": {"data_name": "json", "data_files": "rows.json", "split": "train"},
    "pre_process_data_config": {"text_cols": ["phrase"], "strategy": "pack", "max_seq_len": 128},
}


def document(folder: Path, rotate: dict[str, Any], quantise: dict[str, Any]) -> dict[str, Any]:
    tiny_phi3(folder / "base", hidden=96, initializer_range=0.1, num_attention_heads=6)
    lines = [json.dumps({"phrase": f"the rain would not stop {number} days"}) for number in range(90)]
    (folder / "rows.json").write_text("\n".join(lines))
    body = {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "data_configs": [TEXT],
        "passes": {
            "rotate": rotate,
            "quantise": quantise,
            "export": {"type": "ModelBuilder", "precision": "int4"},
        },
        "cache_dir": "cache",
        "output_dir": "out",
    }
    (folder / "document.json").write_text(json.dumps(body))
    return body


@pytest.mark.parametrize(
    ("rotate", "quantise"),
    [
        ({"type": "QuaRot"}, {"type": "Rtn", "lm_head": True}),
        (
            {"type": "SpinQuant", "data_config": "text", "calibration_tokens": 512, "iters": 4},
            {"type": "Rtn"},
        ),
    ],
    ids=["quarot", "spinquant"],
)
def test_a_rotated_model_is_quantised_and_exported(
    tmp_path: Path, rotate: dict[str, Any], quantise: dict[str, Any]
) -> None:
    body = document(tmp_path, rotate, quantise)
    exported = rotate["type"] == "QuaRot"
    if not exported:
        del body["passes"]["export"]
        (tmp_path / "document.json").write_text(json.dumps(body))
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    said = " ".join(planned.stdout.split())
    assert "they become two" in said
    assert "quantises both" not in said  # the quantiser is checked against what the rotation leaves
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    gates = {(step["name"], gate["gate"]): gate for step in result["steps"] for gate in step["gates"]}
    assert gates["rotate", "equivalence"]["figures"]["kl"] < 1e-7
    assert gates["quantise", "parity"]["passed"]
    rotated = next(step for step in result["steps"] if step["name"] == "rotate")
    assert rotated["facts"]["rotations"] == {"R1": 96, "R2": 16, "layers": 2}
    assert f"rotated with {rotate['type']}" in (tmp_path / "out" / "README.md").read_text()
    if exported:
        assert gates["export", "parity"]["passed"]
        assert (tmp_path / "out" / "model" / "genai_config.json").is_file()


def test_a_rotation_after_the_quantiser_is_refused(tmp_path: Path) -> None:
    body = document(tmp_path, {"type": "QuaRot"}, {"type": "Rtn"})
    passes = body["passes"]
    body["passes"] = {name: passes[name] for name in ("quantise", "rotate")}
    (tmp_path / "document.json").write_text(json.dumps(body))
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert "QuaRot takes a model in floating point" in " ".join((planned.stdout + planned.stderr).split())
