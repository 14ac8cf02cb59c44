"""Fine-tune, merge, quantise on the fine-tuning data, export: one document."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

from tiny import tiny_phi3

TONES = ("sadness", "joy", "fear", "surprise")


def document(folder: Path, quantise: dict[str, Any]) -> Path:
    tiny_phi3(folder / "base", hidden=64, initializer_range=0.2)
    lines = [
        json.dumps({"phrase": f"the rain would not stop {number} days", "tone": TONES[number % 4]})
        for number in range(60)
    ]
    (folder / "rows.json").write_text("\n".join(lines))
    body = {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "rows.json", "split": "train"},
                "pre_process_data_config": {
                    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                    "strategy": "pack",
                    "max_seq_len": 128,
                },
            }
        ],
        "evaluators": {
            "tone": {
                "metrics": [
                    {
                        "name": "accuracy",
                        "type": "accuracy",
                        "data_config": "train",
                        "sub_types": [{"name": "exact_match"}],
                        "labels": list(TONES),
                        "user_config": {},
                    }
                ]
            }
        },
        "passes": {
            "lora": {
                "type": "LoRA",
                "r": 4,
                "alpha": 8,
                "train_data_config": "train",
                "training_args": {"max_steps": 2, "seed": 0},
            },
            "merge": {"type": "MergeAdapterWeights"},
            "quantise": quantise | {"evaluator": "tone"},
            "export": {"type": "ModelBuilder", "precision": "int4"},
        },
        "evaluator": "tone",
        "cache_dir": "cache",
        "output_dir": "out",
    }
    del body["evaluators"]["tone"]["metrics"][0]["user_config"]
    path = folder / "document.json"
    path.write_text(json.dumps(body))
    return path


@pytest.mark.parametrize(
    "quantise",
    [{"type": "Gptq", "calibration_tokens": 512, "lm_head": True}],
    ids=["gptq"],
)
def test_the_document_gives_a_quantised_model(tmp_path: Path, quantise: dict[str, Any]) -> None:
    document(tmp_path, quantise)
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    steps = {step["name"]: step for step in result["steps"]}
    facts = steps["quantise"]["facts"]
    assert facts["calibration_tokens"] == 512
    assert len(facts["layers"]) == 2 * 4 + 1
    parity = next(gate for gate in steps["quantise"]["gates"] if gate["gate"] == "parity")
    assert set(parity["layers"]) == {row["name"] for row in facts["layers"]}
    assert 0.2 < sum(parity["layers"].values()) / parity["figures"]["kl"] < 5  # alone, by estimate
    gates = {(name, gate["gate"]) for name, step in steps.items() for gate in step["gates"]}
    assert {("quantise", "parity"), ("export", "parity"), ("export", "bundle")} <= gates
    exported = next(gate for gate in steps["export"]["gates"] if gate["gate"] == "parity")
    assert exported["figures"]["kl"] < 0.02  # the same integers; activations in int8
    report = (tmp_path / "out" / "report.html").read_text()
    assert "9 layers: errors as shares" in report
    assert "model.layers.1.mlp.down_proj" in report
    again = olive("run", "--config", "document.json", cwd=tmp_path)
    assert again.returncode == 0
    assert all(step["cached"] for step in json.loads((tmp_path / "out" / "run.json").read_text())["steps"])


@pytest.mark.parametrize(
    ("choice", "quantise"),
    [
        ({"algorithm": "k_quant_mixed", "lm_head": True}, {"type": "KQuant", "lm_head": True}),
        (
            {"algorithm": "kl", "bits_per_weight": 7.5, "lm_head": True},
            {"type": "Gptq", "calibration_tokens": 512, "lm_head": True},
        ),
    ],
    ids=["k_quant_mixed", "kl"],
)
def test_bits_by_layer_reach_the_export(
    tmp_path: Path, choice: dict[str, Any], quantise: dict[str, Any]
) -> None:
    path = document(tmp_path, quantise)
    body = json.loads(path.read_text())
    passes = body["passes"]
    choice = {"type": "SelectiveMixedPrecision", "calibration_tokens": 512, **choice}
    del passes["quantise"]["evaluator"], body["evaluator"]
    order = {"lora": passes["lora"], "merge": passes["merge"], "choice": choice}
    path.write_text(json.dumps(body | {"passes": order | passes}))
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    steps = {step["name"]: step for step in result["steps"]}
    high = set(steps["choice"]["facts"]["high"])
    layers = steps["quantise"]["facts"]["layers"]
    assert 0 < len(high) < len(layers)
    assert high == {row["name"] for row in layers if row["bits"] == 8}
    made = Counter(f"{row['bits']} bits in blocks of {row['group_size']}" for row in layers)
    assert made == steps["choice"]["facts"]["settings"]
    assert (len({row["group_size"] for row in layers}) > 1) == (choice["algorithm"] == "kl")
    gates = {gate["gate"]: gate["figures"] for gate in steps["export"]["gates"]}
    assert gates["parity"]["kl"] < 0.02
    assert not (tmp_path / "out" / "model" / "olive_precision.json").exists()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            {"q": {"type": "Rtn"}, "e": {"type": "ModelBuilder", "precision": "fp32"}},
            "precision fp32 would undo",
        ),
        ({"q": {"type": "Rtn"}, "k": {"type": "KQuant"}}, "KQuant takes a model in floating point"),
        (
            {"q": {"type": "Rtn"}, "l": {"type": "LoRA", "train_data_config": "train"}},
            "LoRA takes a model in",
        ),
    ],
)
def test_what_cannot_follow_integers_is_refused_at_plan(
    tmp_path: Path, passes: dict[str, Any], message: str
) -> None:
    path = document(tmp_path, {"type": "Rtn"})
    body = json.loads(path.read_text()) | {"passes": passes}
    path.write_text(json.dumps(body))
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert message in " ".join((planned.stdout + planned.stderr).split())


def test_calibration_without_data_is_refused_at_plan(tmp_path: Path) -> None:
    path = document(tmp_path, {"type": "Gptq"})
    body = json.loads(path.read_text())
    del body["passes"]["lora"], body["passes"]["merge"]
    path.write_text(json.dumps(body))
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert "nothing to calibrate on" in planned.stdout + planned.stderr
