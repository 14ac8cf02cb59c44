"""``olive doctor``."""

from __future__ import annotations

import pytest

from olive.cli import doctor
from olive.cli.main import entry


@pytest.fixture(autouse=True)
def _no_subprocesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "loads", lambda modules: {})


def test_healthy(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (
        "Machine",
        "memory",
        "disk",
        "trains in",
        "runs on",
        "CPUExecutionProvider",
        "pydantic",
        "tested",
    ):
        assert words in out, words


def test_a_library_that_does_not_load_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "loads", lambda modules: {"torch": "libx.so: cannot open shared object file"})
    assert entry(["doctor"]) == 5
    assert "libx.so: cannot open" in " ".join(capsys.readouterr().out.split())


def test_missing_extra_says_what_it_would_bring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: (("pydantic",), {"cpu": ("torch-of-nowhere",)}))
    assert entry(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "lacks torch-of-nowhere; it brings fine-tuning" in out
    assert "pip install 'olive-next[cpu]'" in out


def test_missing_requirement_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: (("pydantic-of-nowhere",), {}))
    assert entry(["doctor"]) == 5
    assert "required and not installed: pydantic-of-nowhere" in capsys.readouterr().out


def test_requirements_are_read_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from email.message import Message

    stated = Message()
    for line in (
        "pydantic>=2.8",
        "torch>=2.6; extra == 'cpu'",
        'ruff>=0.8; python_version > "3" and extra == "dev"',
    ):
        stated["Requires-Dist"] = line
    monkeypatch.setattr(doctor, "metadata", lambda name: stated)
    assert doctor.requirements() == (("pydantic",), {"cpu": ("torch",), "dev": ("ruff",)})


def test_loads_asks_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert doctor.loads({"good": "json", "bad": "module_of_nowhere"}) == {
        "bad": "ModuleNotFoundError: No module named 'module_of_nowhere'"
    }
