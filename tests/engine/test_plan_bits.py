"""A plan tells how many layers get how many bits and what comes out: as the run makes it, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny
from olive.engine.plan import Plan, PlannedStep, plan
from olive.errors import Severity
from olive.passes.base import PassContext
from olive.passes.bits import PlannedBits
from olive.passes.registry import resolve
from olive.report.console import plan_view
from olive.report.plan_json import plan_json
from olive.workflows import load
from passes_kit import run
from training_kit import rows


def _planned(base: Path, folder: Path, *passes: dict[str, Any]) -> Plan:
    folder.mkdir(exist_ok=True)
    text = {
        "text_cols": ["phrase", "tone"],
        "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
        "strategy": "line-by-line",
        "max_seq_len": 64,
    }
    document = {
        "input_model": {"type": "HfModel", "model_path": str(base)},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {
                    "data_name": "json",
                    "data_files": str(rows(folder, 96)),
                    "split": "train",
                },
                "pre_process_data_config": text,
            }
        ],
        "passes": {f"step{number}": each for number, each in enumerate(passes)},
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    found = plan(load(document))
    assert [problem for problem in found.findings if problem.severity is Severity.ERROR] == []
    return found


def _bits(step: PlannedStep) -> PlannedBits:
    assert step.bits is not None
    return step.bits


def _ways(made: PassContext) -> Counter[tuple[int, int]]:
    return Counter((row["bits"], row["group_size"]) for row in made.facts["layers"])


def _told(bits: PlannedBits) -> dict[tuple[int, int], int]:
    return {(one.bits, one.group_size): one.layers for one in bits.settings}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"bits": 2, "group_size": 16, "sym": True},
        {"lm_head": True, "embeds": True},
        {"overrides": {"*.down_proj": {"bits": 8}, "*.o_proj": {"group_size": -1, "symmetric": True}}},
        {"lm_head": True, "overrides": {"lm_head": {"bits": 8}}, "modules_to_not_convert": ["*.down_proj"]},
    ],
)
def test_a_quantiser_makes_what_its_plan_told(tmp_path: Path, params: dict[str, Any]) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    found = _planned(base, tmp_path / "plan", {"type": "Rtn", **params})
    bits = _bits(found.steps[0])
    made = run("Rtn", base, tmp_path / "run", **params)
    assert _told(bits) == _ways(made)
    assert bits.layers == len(made.facts["layers"])
    assert bits.bytes == made.facts["bytes"] == found.steps[0].cost.disk
    assert not any((bits.about, bits.at_most, bits.chooses))
    shown = " ".join(plan_view(found).split())
    for one in bits.settings:
        assert f"{one.layers} at {one.bits} bits" in shown
    assert "for all tensors of the model" in shown


@pytest.mark.parametrize("algorithm", ["k_quant_last", "k_quant_down", "k_quant_mixed"])
def test_a_rule_reaches_the_quantiser_after_it(tmp_path: Path, algorithm: str) -> None:
    base = tiny.tiny_phi3(tmp_path / "base", layers=8)
    rule = {"algorithm": algorithm, "lm_head": True}
    own = {"lm_head": True, "overrides": {"*.layers.0.mlp.down_proj": {"bits": 2}}}
    found = _planned(
        base, tmp_path / "plan", {"type": "SelectiveMixedPrecision", **rule}, {"type": "Rtn", **own}
    )
    chosen, made = map(_bits, found.steps)
    choice = run("SelectiveMixedPrecision", base, tmp_path / "choice", **rule)
    assert sum(one.layers for one in chosen.settings if one.bits == 8) == len(choice.facts["high"])
    assert chosen.chooses
    assert chosen.bytes == choice.facts["bytes"]
    quantised = run("Rtn", choice.out, tmp_path / "run", **own)
    assert _told(made) == _ways(quantised)
    assert (2, 32) in _told(made)
    assert made.bytes == quantised.facts["bytes"]


def test_of_a_budget_the_most_is_told(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base", initializer_range=0.2)
    measured = {"data_config": "train", "calibration_tokens": 256, "bits_per_weight": 7.0}
    found = _planned(
        base, tmp_path / "plan", {"type": "SelectiveMixedPrecision", **measured}, {"type": "Rtn"}
    )
    chosen, made = map(_bits, found.steps)
    assert chosen.settings == made.settings == ()
    assert chosen.at_most
    assert made.at_most
    choice = run("SelectiveMixedPrecision", base, tmp_path / "choice", **measured)
    assert chosen.layers == len(json.loads((choice.out / "olive_precision.json").read_text()))
    assert chosen.bytes is not None
    assert made.bytes is not None
    assert 0.9 * chosen.bytes < choice.facts["bytes"] <= chosen.bytes
    quantised = run("Rtn", choice.out, tmp_path / "run")
    assert made.bytes - quantised.facts["bytes"] == chosen.bytes - choice.facts["bytes"]
    assert "as the step before it chooses" in plan_view(found)
    # an override may take a layer out of the budget
    other = {"type": "Rtn", "overrides": {"*.o_proj": {"bits": 8}}}
    found = _planned(base, tmp_path / "more", {"type": "SelectiveMixedPrecision", **measured}, other)
    assert _bits(found.steps[1]).bytes is None


def test_what_a_merge_stores_may_be_wider(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    lora = {"type": "LoRA", "r": 4, "train_data_config": "train", "training_args": {"max_steps": 2}}
    found = _planned(base, tmp_path / "plan", lora, {"type": "MergeAdapterWeights"}, {"type": "Rtn"})
    assert [step.bits is None for step in found.steps] == [True, True, False]
    assert _bits(found.steps[2]).about
    assert "about " in plan_view(found).partition("Bits of step2")[2].partition("tensors")[0]


def test_a_pass_that_raises_is_its_developers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("no such tensor")

    monkeypatch.setattr(resolve("Rtn"), "bits", broken)
    base = tiny.tiny_phi3(tmp_path / "base")
    with pytest.raises(AssertionError, match=r"Rtn.bits raised KeyError"):
        _planned(base, tmp_path / "plan", {"type": "Rtn"})


def test_as_json_and_without_torch(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    found = _planned(
        base,
        tmp_path / "plan",
        {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_down"},
        {"type": "KQuant", "lm_head": True, "overrides": {"*.o_proj": {"bits": 8}}},
    )
    path = tmp_path / "document.json"
    path.write_text(json.dumps(found.document))
    code = (
        "import sys; from olive.cli.main import entry\n"
        f"code = entry(['plan', {str(path)!r}, '--json'])\n"
        "heavy = {'torch', 'transformers', 'safetensors.torch', 'datasets'} & set(sys.modules)\n"
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step["bits"] for step in steps] == [step["bits"] for step in plan_json(found)["steps"]]
    made = steps[1]["bits"]
    assert set(made) == {"settings", "layers", "options", "bytes", "at_most", "about", "chooses"}
    # at 8 bits: both o_proj, and down_proj of the first of two layers
    assert {(one["bits"], one["layers"]) for one in made["settings"]} == {(4, 6), (8, 3)}
