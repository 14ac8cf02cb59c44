"""Versions: what was tested, what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from olive.errors import Severity
from olive.hardware.probe import probe
from olive.hardware.tested import KNOWN, TESTED, check, version_tuple

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def test_the_tested_set_is_the_constraints_file() -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    assert dict(line.split("==") for line in lines if line and not line.startswith("#")) == TESTED
    assert set(TESTED) <= set(KNOWN)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("0.18", (0, 18)),
        ("1.32.0rc1", (1, 32)),
        ("5.0.0", (5,)),
        ("", ()),
        ("dev", ()),
    ],
)
def test_version_tuple(text: str, numbers: tuple[int, ...]) -> None:
    assert version_tuple(text) == numbers


def test_the_tested_set_has_no_findings() -> None:
    beside = {"torch": "2.13.0+cpu", "tokenizers": "0.23.3", "huggingface-hub": "2.4.0"}
    assert list(check(TESTED | beside)) == []


def test_this_machine_has_no_errors() -> None:
    assert [problem for problem in check(probe().packages) if problem.severity is Severity.ERROR] == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-gpu"])
def test_a_runtime_too_old_for_genai(runtime: str) -> None:
    found = check({"onnxruntime-genai": "0.18.0", runtime: "1.30.1"})
    (problem,) = (problem for problem in found if problem.severity is Severity.ERROR)
    assert problem.exit_code == 5
    assert f"{runtime} 1.30.1" in problem.message
    assert problem.fix == f'pip install --upgrade "{runtime}>=1.31"'


def test_genai_without_any_runtime() -> None:
    (problem,) = (p for p in check({"onnxruntime-genai": "0.18.0"}) if p.severity is Severity.ERROR)
    assert "none" in problem.message


def test_an_older_genai_makes_no_such_demand() -> None:
    found = check({"onnxruntime-genai": "0.13.2", "onnxruntime": "1.24.0"})
    assert {problem.severity for problem in found} == {Severity.NOTE}


def test_two_builds_of_one_module_are_warned_of() -> None:
    found = check({"onnxruntime": TESTED["onnxruntime"], "onnxruntime-gpu": TESTED["onnxruntime"]})
    (problem,) = found
    assert problem.severity is Severity.WARNING
    assert "onnxruntime and onnxruntime-gpu" in problem.message


def test_other_versions_are_noted() -> None:
    torch, peft = check({"peft": "99.0", "torch": "2.6.0"})
    assert "torch 2.6.0 is older than 2.13.0" in torch.message
    assert "peft 99.0 is newer than" in peft.message
    assert torch.severity is peft.severity is Severity.NOTE
