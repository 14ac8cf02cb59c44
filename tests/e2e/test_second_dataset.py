"""The example's document on another dataset of that shape: other labels, few rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

EXAMPLE = Path(__file__).parents[2] / "examples" / "phi3-tone"
DATA = Path(__file__).parent / "data"
LABELS = ["anger", "gratitude", "boredom", "pride"]


def document(epochs: int) -> dict[str, Any]:
    """The demo with its data files, labels and number of epochs changed, and nothing else."""
    body: dict[str, Any] = json.loads((EXAMPLE / "tone.json").read_text())
    body["input_model"]["model_path"] = str(EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini")
    files = {"train": "feelings-train.json", "validation": "feelings-test.json", "test": "feelings-test.json"}
    for config in body["data_configs"]:
        config["load_dataset_config"]["data_files"] = str(DATA / files[config["name"]])
    body["evaluators"]["tone"]["metrics"] = body["evaluators"]["tone"]["metrics"][:1]
    body["evaluators"]["tone"]["metrics"][0]["labels"] = LABELS
    body["passes"]["lora"]["training_args"] |= {"num_train_epochs": epochs, "eval_strategy": "no"}
    return body


@pytest.mark.full
def test_a_strangers_four_labels_are_learnt(tmp_path: Path) -> None:
    (tmp_path / "doc.json").write_text(json.dumps(document(epochs=10)))
    done = olive("run", "--config", "doc.json", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "olive-output" / "run.json").read_text())

    def exact(scores: list[dict[str, Any]]) -> float:
        return float(next(score["value"] for score in scores if score["name"] == "exact_match"))

    base = exact(result["input_scores"])
    tuned, int4 = (exact(step["scores"]) for step in result["steps"] if step["scores"])
    print(f"base {base:.3f}, fine-tuned {tuned:.3f}, int4 {int4:.3f}")
    assert base <= 0.1
    assert tuned >= 0.85
    assert int4 >= tuned - 0.07
