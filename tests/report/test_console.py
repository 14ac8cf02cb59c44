"""What the terminal says."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import sample_result as fake

from olive.errors import Problem, Severity
from olive.report.console import columns, problems, summary


def test_summary_is_plain_and_fits_a_chat() -> None:
    text = summary(fake.result(), "olive-output")
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 18
    for words in (
        "0.929",
        "from the cache",
        "merge passed (KL 2.1e-08, at most 1e-06)",
        "olive chat olive-output",
    ):
        assert words in " ".join(text.split()), words


def test_a_run_from_the_cache_says_so() -> None:
    steps = tuple(step.model_copy(update={"cached": True}) for step in fake.result().steps)
    assert "steps all from the cache" in " ".join(summary(fake.result(steps=steps)).split())


def test_problems_order_and_parts() -> None:
    found = [
        Problem("a note", where="file.json:7: $.passes.lora", fix="drop it", severity=Severity.NOTE),
        Problem("an error with hf_" + "a" * 30, where="file.json:3: $.passes", fix="do this"),
        Problem("a warning", severity=Severity.WARNING),
    ]
    assert problems(found).splitlines() == [
        "error: an error with [redacted]",
        "  at  file.json:3: $.passes",
        "  fix do this",
        "warning: a warning",
        "note: a note [file.json:7]; drop it",
    ]


def test_columns() -> None:
    assert columns([["", "a"], ["bb", "ccc"]]) == ["         a", "  bb   ccc"]
    assert columns([]) == []
