"""An evaluation that breaks is not our own defect, and is never stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olive.engine.plan import plan
from olive.engine.run import run
from olive.errors import EnvironmentFault, PassFailed
from olive.report.progress import LogProgress
from olive.workflows import load
from tiny import tiny_phi3

BREAKS: list[tuple[BaseException, type[Exception], str]] = [
    (RuntimeError("shape mismatch"), PassFailed, "evaluation of the hf model: RuntimeError: shape mismatch"),
    (SystemExit(0), PassFailed, "ended the program"),
    (MemoryError("8 GB"), EnvironmentFault, "memory ran out"),
]


@pytest.mark.parametrize(("breaks", "kind", "says"), BREAKS, ids=["raises", "leaves", "memory"])
def test_an_evaluation_that_breaks(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaks: BaseException,
    kind: type[Exception],
    says: str,
) -> None:
    tiny_phi3(tmp_path / "base")
    document: dict[str, Any] = {
        "input_model": {"type": "HfModel", "model_path": str(tmp_path / "base")},
        "evaluators": {"size": {"metrics": [{"name": "size", "type": "size_on_disk"}]}},
        "evaluator": "size",
        "passes": {"export": {"type": "ModelBuilder", "precision": "fp32"}},
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }

    def fail(*_: Any, **__: Any) -> None:
        raise breaks

    monkeypatch.setattr("olive.evaluation.evaluate.evaluate", fail)
    planned = plan(load(document))
    with pytest.raises(kind, match=says):
        run(planned, LogProgress())
    assert not list((tmp_path / "cache").glob("entries/*"))
    assert not list((tmp_path / "cache").glob("leases/*.lease"))


def test_folders_that_cannot_be_written_are_told_at_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document: dict[str, Any] = {
        "input_model": {"type": "HfModel", "model_path": "nowhere"},
        "passes": {"export": {"type": "ModelBuilder", "precision": "fp32"}},
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "deep" / "out"),
    }
    monkeypatch.setattr("olive.engine.resources.os.access", lambda *_: False)
    found = [p for p in plan(load(document)).findings if "cannot be written" in p.message]
    assert [(p.where, p.exit_code) for p in found] == [("cache_dir", 5), ("output_dir", 5)]
