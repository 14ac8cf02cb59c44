"""A fallback that is killed on one of its rungs goes on there, and still tells of every rung above."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from fault_kit import Done, Fault, run, store
from test_quantised_document import document

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks")
RUNGS = ["lm_head", "down_proj", "group_size"]


def _write(folder: Path, max_kl: float) -> None:
    quantise = {"type": "Rtn", "group_size": 64, "lm_head": True, "fallback": RUNGS}
    path = document(folder, quantise)
    body = json.loads(path.read_text())
    passes = body["passes"]
    del passes["quantise"]["evaluator"], body["evaluator"], passes["export"], passes["lora"], passes["merge"]
    gate = {"max_kl": max_kl, "min_top1": 0.0}
    path.write_text(json.dumps(body | {"gates": {"parity": gate}}))


def _run(folder: Path, fault: Fault | None = None) -> Done:
    return run("run", "document.json", "--cache-dir", ".olive-cache", cwd=folder, fault=fault)


def _step(folder: Path) -> dict[str, Any]:
    step: dict[str, Any] = json.loads((folder / "out" / "run.json").read_text())["steps"][0]
    return step


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> float:
    """A limit that the third attempt meets and the two before do not."""
    folder = tmp_path_factory.mktemp("all-fail")
    _write(folder, 1e-9)
    done = _run(folder)
    assert done.code == 3, done.said
    assert store(folder, "work") == [], "where every rung has failed nothing is remembered"
    found = [float(kl) for kl in re.findall(r"is (\d\S*) nat a token", " ".join(done.said.split()))]
    first, second, third = found[:3]
    assert third < min(first, second)
    return (third + min(first, second)) / 2


@pytest.fixture(scope="module")
def calm(limit: float, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the document ran undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    _write(folder, limit)
    done = _run(folder)
    assert done.code == 0, done.said
    assert store(folder, "work") == []
    return folder


@pytest.fixture
def killed(limit: float, tmp_path: Path) -> Path:
    """A workspace in which the run was killed on the third rung, with one of its two layers done."""
    _write(tmp_path, limit)
    third = Fault(at=r"/rung-[0-9a-f]{16}/layer-1/ckpt-1\.tmp", after=4)  # two file operations a rung
    done = _run(tmp_path, third)
    assert done.code == -signal.SIGKILL, done.said
    return tmp_path


def _told(done: Done) -> int:
    return len(re.findall(r"falling back to", " ".join(done.said.split())))


def _same(folder: Path, calm: Path) -> None:
    """The artifact, its gates and what is told of every rung are those of the undisturbed run."""
    own, other = _step(folder), _step(calm)
    assert own["digest"] == other["digest"]
    assert own["gates"] == other["gates"]
    assert [gate["passed"] for gate in own["gates"]] == [False, False, True]
    assert own["facts"]["fallback"] == other["facts"]["fallback"]
    findings = json.loads((folder / "out" / "run.json").read_text())["findings"]
    assert sum("falling back to" in finding["message"] for finding in findings) == 2
    report = (folder / "out" / "report.html").read_text()
    for each in own["facts"]["fallback"]:
        assert each["change"] in report
    assert store(folder, "work") == store(folder, "staging") == []


def test_it_goes_on_at_its_rung(killed: Path, calm: Path) -> None:
    done = _run(killed)
    assert done.code == 0, done.said
    assert (
        " ".join(done.said.split()).count("(in an earlier run)") == _told(done) == 4
    )  # as it comes, and at the end
    assert done.said.count("parity gate\n") == 1, "no rung above is tried again"
    assert _step(killed)["facts"]["layers_from_journal"] == 1
    _same(killed, calm)


def test_killed_while_the_failure_is_kept(limit: float, calm: Path, tmp_path: Path) -> None:
    """The rung's layers are still there: it is only held against the gate again."""
    _write(tmp_path, limit)
    done = _run(tmp_path, Fault(at=r"/failed/ckpt-2\.tmp"))
    assert done.code == -signal.SIGKILL, done.said
    done = _run(tmp_path)
    assert done.code == 0, done.said
    assert " ".join(done.said.split()).count("(in an earlier run)") == 2
    assert done.said.count("parity gate\n") == 2
    _same(tmp_path, calm)


def test_a_damaged_memory_begins_at_the_first_rung(killed: Path, calm: Path) -> None:
    manifests = list((killed / ".olive-cache" / "work").glob("*/failed/ckpt-*/manifest.json"))
    assert len(manifests) == 2
    for path in manifests:
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)
    done = _run(killed)
    assert done.code == 0, done.said
    assert "is damaged" in done.said
    assert "(in an earlier run)" not in done.said
    assert done.said.count("parity gate\n") == 3
    _same(killed, calm)


def test_other_prompts_begin_at_the_first_rung(killed: Path) -> None:
    """A failure holds for the prompts it was measured on; the key of a quantiser without data has none."""
    path = killed / "document.json"
    body = json.loads(path.read_text())
    body["evaluator"] = "tone"
    path.write_text(json.dumps(body))
    done = _run(killed, Fault(at=r"/failed/ckpt-2\.tmp"))
    assert done.code == -signal.SIGKILL, done.said
    assert "(in an earlier run)" not in done.said
    assert "tried again: rungs, gates or prompts changed" in " ".join(done.said.split())
    done = _run(killed)
    assert done.said.count("tried again") == 0, "the older record is gone"
    assert " ".join(done.said.split()).count("(in an earlier run)") == 2  # one rung, told twice
