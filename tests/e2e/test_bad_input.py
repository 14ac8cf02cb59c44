"""Bad input is refused before time is spent, with the right code, and nothing is lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

from tiny import tiny_phi3

Change = Callable[[dict[str, Any], Path], None]


def document() -> dict[str, Any]:
    return {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "rows.json", "split": "train"},
                "pre_process_data_config": {
                    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                    "strategy": "line-by-line",
                    "max_seq_len": 64,
                },
            }
        ],
        "passes": {
            "lora": {
                "type": "LoRA",
                "r": 4,
                "target_modules": ["qkv_proj"],
                "train_data_config": "train",
                "training_args": {"max_steps": 2},
            },
            "merge": {"type": "MergeAdapterWeights"},
        },
    }


def missing_file(document: dict[str, Any], folder: Path) -> None:
    (folder / "rows.json").unlink()


def missing_column(document: dict[str, Any], folder: Path) -> None:
    document["data_configs"][0]["pre_process_data_config"]["text_template"] = "{phrase} {mood}"


def missing_module(document: dict[str, Any], folder: Path) -> None:
    document["passes"]["lora"]["target_modules"] = ["q_proj"]


def empty_join(document: dict[str, Any], folder: Path) -> None:
    document["data_configs"][0]["pre_process_data_config"] |= {"strategy": "join", "max_seq_len": 100_000}


def no_weights(document: dict[str, Any], folder: Path) -> None:
    (folder / "base" / "model.safetensors").unlink()


def truncated_weights(document: dict[str, Any], folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign_output(document: dict[str, Any], folder: Path) -> None:
    (folder / "olive-output").mkdir()
    (folder / "olive-output" / "thesis.txt").write_text("mine")


def misspelt(document: dict[str, Any], folder: Path) -> None:
    document["passes"]["lora"]["training_args"]["max_stepz"] = 3


def unknown_pass(document: dict[str, Any], folder: Path) -> None:
    document["passes"]["lora"]["type"] = "LoRa2"


def wrong_order(document: dict[str, Any], folder: Path) -> None:
    document["passes"] = {"merge": {"type": "MergeAdapterWeights"}}


CASES: list[tuple[Change, int, str]] = [
    (missing_file, 2, "rows.json"),
    (missing_column, 2, "phrase"),
    (missing_module, 2, "qkv_proj"),
    (empty_join, 2, "100000"),
    (no_weights, 2, "safetensors"),
    (truncated_weights, 6, "model.safetensors"),
    (foreign_output, 2, "thesis.txt"),
    (misspelt, 2, "max_steps"),
    (unknown_pass, 2, "LoRA"),
    (wrong_order, 2, "LoRA"),
]


@pytest.mark.parametrize(
    ("change", "code", "says"), CASES, ids=lambda value: getattr(value, "__name__", None)
)
def test_bad_input_is_refused(tmp_path: Path, change: Change, code: int, says: str) -> None:
    tiny_phi3(tmp_path / "base")
    rows = [{"phrase": f"phrase number {i}", "tone": "joy"} for i in range(8)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    body = document()
    change(body, tmp_path)
    (tmp_path / "doc.json").write_text(json.dumps(body))
    started = time.monotonic()
    done = olive("run", "--config", "doc.json", cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "olive-output" / "model").exists()
    if change is foreign_output:
        assert (tmp_path / "olive-output" / "thesis.txt").read_text() == "mine"
