"""Documents that differ in bits and budgets share what was measured on their model, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from fault_kit import Done, Fault, copy, run, store
from test_quantised_document import document

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks")
CHOICE = {
    "type": "SelectiveMixedPrecision",
    "data_config": "train",
    "calibration_tokens": 512,
    "bits_per_weight": 7.0,
}

OTHER = CHOICE | {"bits_per_weight": 5.5}


def _write(folder: Path, *passes: dict[str, Any]) -> None:
    path = document(folder, {}) if not (folder / "base").exists() else folder / "document.json"
    body = json.loads(path.read_text())
    body.pop("evaluator", None)
    body["passes"] = {f"step{number}": each for number, each in enumerate(passes)}
    path.write_text(json.dumps(body))


def _run(folder: Path, fault: Fault | None = None) -> Done:
    return run("run", "document.json", "--cache-dir", ".olive-cache", cwd=folder, fault=fault)


def _steps(folder: Path) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads((folder / "out" / "run.json").read_text())["steps"]
    return steps


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which bits were chosen by one budget."""
    folder = tmp_path_factory.mktemp("measured") / "work"
    folder.mkdir()
    _write(folder, CHOICE)
    done = _run(folder)
    assert done.code == 0, done.said
    counts = _steps(folder)[0]["facts"]["statistics"]
    assert counts["reused"] == {}
    assert counts["computed"] == {"losses": 4, "errors": 26, "rows": 1}
    assert len(store(folder, "statistics")) == 31  # rows of 64 inputs take no blocks of 128
    return folder


@pytest.fixture(scope="module")
def alone(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The choice by another budget where nothing was measured before."""
    folder = copy(measured, tmp_path_factory.mktemp("alone") / "work")
    shutil.rmtree(folder / ".olive-cache")
    _write(folder, OTHER)
    assert _run(folder).code == 0
    (step,) = _steps(folder)
    assert step["facts"]["statistics"]["reused"] == {}
    return step


def test_another_budget_computes_nothing_and_other_bits_nothing_twice(
    measured: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy(measured, tmp_path / "work")
    _write(folder, OTHER)
    assert _run(folder).code == 0
    (step,) = _steps(folder)
    assert not step["cached"]
    assert step["facts"]["statistics"] == {"reused": {"losses": 4, "errors": 26}, "computed": {}}
    assert step["digest"] == alone["digest"]
    own, other = ({k: v for k, v in each["facts"].items() if k != "statistics"} for each in (step, alone))
    assert own == other  # every KL to the bit

    _write(folder, CHOICE | {"bits": 2, "group_sizes": [32]})  # what is at 8 bits was measured before
    assert _run(folder).code == 0
    (step,) = _steps(folder)
    assert step["facts"]["statistics"] == {
        "reused": {"rows": 1, "errors": 4},
        "computed": {"losses": 4, "errors": 4},
    }


def test_a_choice_that_was_measured_is_planned_from(measured: Path, tmp_path: Path) -> None:
    folder = copy(measured, tmp_path / "work")
    _write(folder, CHOICE, {"type": "KQuant"})
    done = run("plan", "document.json", "--cache-dir", ".olive-cache", "--json", cwd=folder)
    assert done.code == 0, done.said
    (step,) = _steps(measured)
    chosen = {
        f"{one['bits']} bits in blocks of {one['group_size']}": one["layers"]
        for one in json.loads(done.out)["steps"][1]["bits"]["settings"]
    }
    assert chosen == step["facts"]["settings"]


def test_a_calibrated_quantiser_takes_the_same_rows(measured: Path, tmp_path: Path) -> None:
    """Of what Gptq measures nothing else can be shared: it depends on the layers quantised before."""
    steps = []
    for name in ("with", "without"):
        folder = copy(measured, tmp_path / name)
        if name == "without":
            shutil.rmtree(folder / ".olive-cache")
        _write(folder, {"type": "Gptq", "data_config": "train", "calibration_tokens": 512})
        assert _run(folder).code == 0
        steps += _steps(folder)
    assert [step["facts"]["statistics"] for step in steps] == [
        {"reused": {"rows": 1}, "computed": {}},
        {"reused": {}, "computed": {"rows": 1}},
    ]
    assert steps[0]["digest"] == steps[1]["digest"]


def test_a_flipped_bit_is_measured_again(measured: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    folder = copy(measured, tmp_path / "work")
    for name in store(folder, "statistics"):
        path = folder / ".olive-cache" / "statistics" / name
        manifest = json.loads((path / "manifest.json").read_text())["body"]
        if manifest["inputs"]["statistic"] == "losses" and manifest["inputs"]["own"]["kind"] == "down_proj":
            values = path / "files" / "values.safetensors"
            content = bytearray(values.read_bytes())
            content[-1] ^= 1
            values.write_bytes(content)
    _write(folder, OTHER)
    done = _run(folder)
    assert done.code == 0, done.said
    (step,) = _steps(folder)
    counts = step["facts"]["statistics"]
    assert counts["computed"] == {"losses": 1}
    assert counts["reused"] == {"losses": 3, "errors": 26, "rows": 1}
    findings = json.loads((folder / "out" / "run.json").read_text())["findings"]
    assert any("the stored statistic" in finding["message"] for finding in findings)
    assert len(store(folder, "quarantine")) == 1
    assert step["digest"] == alone["digest"]


def test_killed_in_the_middle_it_goes_on_from_what_is_whole(measured: Path, tmp_path: Path) -> None:
    _write(tmp_path, CHOICE)
    done = _run(tmp_path, fault=Fault(at=r"/statistics/[0-9a-f]{64}$", after=9))
    assert done.code == -signal.SIGKILL, done.said
    assert len(store(tmp_path, "statistics")) == 9
    assert store(tmp_path, "entries") == []
    done = _run(tmp_path)
    assert done.code == 0, done.said
    counts = _steps(tmp_path)[0]["facts"]["statistics"]
    assert counts["reused"] == {"losses": 4, "errors": 4}
    assert counts["computed"] == {"errors": 22}
    assert store(tmp_path, "quarantine") == store(tmp_path, "staging") == []
    assert _steps(tmp_path)[0]["digest"] == _steps(measured)[0]["digest"]
