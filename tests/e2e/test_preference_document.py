"""A document with DPO, from plan to the exported model; one that goes on from an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

import preference_kit
from adapter_kit import make_adapter
from tiny import tiny_phi3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_phi3(tmp_path / "base")
    preference_kit.write(tmp_path, list(preference_kit.pairs(32)))
    return tmp_path


def document(kind: str, **changes: Any) -> dict[str, Any]:
    return {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "data_configs": [
            {
                "name": "train",
                "load_dataset_config": {"data_name": "json", "data_files": "pairs.jsonl", "split": "train"},
                "pre_process_data_config": {"max_seq_len": 96},
            }
        ],
        "passes": {
            "tune": {
                "type": kind,
                "r": 4,
                "train_data_config": "train",
                "eval_dataset_size": 8,
                "training_args": {"max_steps": 6, "learning_rate": 5e-3, "eval_strategy": "epoch"},
            }
            | changes,
            "merge": {"type": "MergeAdapterWeights"},
            "export": {"type": "ModelBuilder", "precision": "fp32"},
        },
    }


def run(folder: Path, body: dict[str, Any]) -> dict[str, Any]:
    (folder / "doc.json").write_text(json.dumps(body))
    done = olive("run", "--config", "doc.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "olive-output" / "run.json").read_text())
    return found


def test_a_document_with_dpo_runs_to_the_exported_model(folder: Path) -> None:
    (folder / "doc.json").write_text(json.dumps(document("DPO")))
    planned = olive("plan", "doc.json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert "the chosen answer against the rejected one" in planned.stdout
    assert "in 24 pairs of up to" in planned.stdout
    result = run(folder, document("DPO"))
    tune, merge, _ = result["steps"]
    assert [(gate["gate"], gate["passed"]) for gate in merge["gates"]] == [("merge", True)]
    assert {"rewards/accuracies", "eval_rewards/margins"} <= {n for p in tune["series"]["loss"] for n in p}
    assert 0 <= tune["facts"]["eval_rewards_accuracies"] <= 1
    assert (folder / "olive-output" / "model" / "genai_config.json").is_file()
    assert "eval rewards accuracies" in (folder / "olive-output" / "report.html").read_text()
    again = run(folder, document("DPO"))
    assert [step["cached"] for step in again["steps"]] == [True] * 3


def test_an_adapter_is_gone_on_from(folder: Path) -> None:
    make_adapter(folder / "base", folder / "adapter")
    second = document("DPO")
    second["input_model"]["adapter_path"] = "adapter"
    del second["passes"]["export"]
    result = run(folder, second)
    assert result["steps"][0]["series"]["loss"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert result["steps"][1]["gates"][0]["passed"]


def test_a_plan_refuses_rows_that_are_no_preferences(folder: Path) -> None:
    preference_kit.write(folder, [{"prompt": "a", "completion": "b"}] * 8)
    (folder / "doc.json").write_text(json.dumps(document("DPO")))
    done = olive("plan", "doc.json", cwd=folder)
    assert done.returncode == 2
    assert "pairs of a chosen and a rejected answer are needed" in done.stdout + done.stderr


def test_a_plan_with_pairs_imports_nothing_heavy(folder: Path) -> None:
    (folder / "doc.json").write_text(json.dumps(document("ORPO")))
    code = (
        "import sys; from olive.workflows import plan; found = plan('doc.json')\n"
        "assert found.previews['train'].blocks == 24\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'trl', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
