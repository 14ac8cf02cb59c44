"""A gate that fails: the rungs that the document allows are tried, and said; without one the run fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive
from test_quantised_document import document


def _run(folder: Path, gate: dict[str, Any], **quantise: Any) -> tuple[int, str]:
    path = document(folder, {"type": "Rtn", "group_size": 64, "lm_head": True, **quantise})
    body = json.loads(path.read_text())
    passes = body["passes"]
    del passes["quantise"]["evaluator"], body["evaluator"], passes["export"], passes["lora"], passes["merge"]
    path.write_text(json.dumps(body | {"gates": {"parity": gate}}))
    done = olive("run", "--config", "document.json", cwd=folder)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_failing_gate_goes_down_until_it_passes(tmp_path: Path) -> None:
    code, _ = _run(tmp_path, {"max_kl": 1e9, "min_top1": 0.0})
    assert code == 0
    step = json.loads((tmp_path / "out" / "run.json").read_text())["steps"][0]
    first = step["gates"][0]["figures"]["kl"]
    strict = {"max_kl": 0.75 * first, "min_top1": 0.0}
    code, said = _run(tmp_path, strict)
    assert code == 3
    assert '"fallback": true' in said
    code, said = _run(tmp_path, strict, fallback=True)
    assert code == 0, said
    step = json.loads((tmp_path / "out" / "run.json").read_text())["steps"][0]
    *failed, last = step["facts"]["fallback"]
    assert failed
    assert failed[0]["rung"] is None
    assert failed[0]["kl"] == pytest.approx(first)
    assert last["passed"]
    assert last["kl"] <= strict["max_kl"] < min(each["kl"] for each in failed)
    assert last["rung"] == ("lm_head", "down_proj", "group_size")[len(failed) - 1]
    assert [gate["passed"] for gate in step["gates"]] == [False] * len(failed) + [True]
    bits = {row["name"]: row["bits"] for row in step["facts"]["layers"]}
    assert bits["lm_head"] == 8
    assert "falling back to 8 bits for lm_head" in said
    report = (tmp_path / "out" / "report.html").read_text()
    assert "as the document has it" in report
    assert f"{first:.3g}"[:4] in report


def test_no_rung_is_enough(tmp_path: Path) -> None:
    code, said = _run(
        tmp_path,
        {"max_kl": 1e-9, "min_top1": 0.0},
        fallback=["down_proj", "group_size", "Gptq"],
        fallback_data_config="train",
    )
    assert code == 3
    assert "on the last rung of the fallback" in said
    for rung in ("8 bits for *.down_proj", "blocks of 32", "blocks of 16", "Gptq in its place"):
        assert rung in said
    assert "8 bits for lm_head" not in said
    assert not (tmp_path / "out" / "model").exists()


def test_a_rung_without_data_is_refused_at_plan(tmp_path: Path) -> None:
    code, said = _run(tmp_path, {}, fallback=["Gptq"])
    assert code == 2
    assert "the rung Gptq has nothing to calibrate on" in said
