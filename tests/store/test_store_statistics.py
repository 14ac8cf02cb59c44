"""Statistics: found to the bit or not at all, whatever befalls the process or the disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from store_kit import compute, fork, kill_points, run_killed, status

from olive.cli.main import entry
from olive.errors import Severity
from olive.store.statistics import Statistics
from olive.store.store import Store

PARTS = {"model": "0" * 64, "source": {"pass": "1"}}
OWN = {"bits": 4}


def made() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 500, generator=draw), "b": torch.tensor([1e-300, 2.5], dtype=torch.float64)}


def kept(root: Path, parts: dict[str, Any] = PARTS, data: dict[str, Any] | None = None) -> Statistics:
    return Statistics(root, parts, data)


def same(found: dict[str, torch.Tensor] | None) -> bool:
    """To the bit."""
    assert found is not None
    wanted = made()
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def folders(root: Path) -> list[Path]:
    return sorted((root / "statistics").iterdir()) if (root / "statistics").exists() else []


def test_found_again_to_the_bit_and_under_no_other_parts(tmp_path: Path) -> None:
    first = kept(tmp_path, data={"train": "rows"})
    assert same(first.of("errors", OWN, made, data="train"))
    assert first.counts == {"reused": {}, "computed": {"errors": 1}}
    second = kept(tmp_path, data={"other-name": "rows"})
    assert same(second.of("errors", OWN, lambda: pytest.fail("computed again"), data="other-name"))
    assert second.counts == {"reused": {"errors": 1}, "computed": {}}
    assert second.find("losses", OWN, data="other-name") is None
    assert second.find("errors", {"bits": 2}, data="other-name") is None
    assert second.find("errors", OWN) is None
    assert kept(tmp_path, data={"train": "changed"}).find("errors", OWN, data="train") is None
    for other in ({**PARTS, "model": "2" * 64}, {**PARTS, "source": {"pass": "2"}}):
        assert kept(tmp_path, other, {"train": "rows"}).find("errors", OWN, data="train") is None
    assert len(folders(tmp_path)) == 1
    assert not list((tmp_path / "leases").glob("*.lease"))
    assert not list((tmp_path / "staging").iterdir())


def test_without_a_store_everything_is_computed() -> None:
    nowhere = Statistics()
    for _ in range(2):
        assert same(nowhere.of("errors", OWN, made))
    assert nowhere.counts == {"reused": {}, "computed": {"errors": 2}}
    assert Statistics().counts == {}


@pytest.mark.parametrize("name", ["manifest.json", "files/values.safetensors"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_is_set_aside_and_computed_again(tmp_path: Path, name: str, how: str) -> None:
    kept(tmp_path).of("errors", OWN, made)
    path = folders(tmp_path)[0] / name
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    again = kept(tmp_path)
    assert same(again.of("errors", OWN, made))
    assert again.counts == {"reused": {}, "computed": {"errors": 1}}
    (finding,) = again.findings
    assert "the stored statistic" in finding.message
    assert finding.severity is Severity.WARNING
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    assert same(kept(tmp_path).find("errors", OWN))


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.full)])
def test_kill_at_every_file_operation(memory: Path, stride: int) -> None:
    made()

    def job(root: Path) -> None:
        kept(root).of("errors", OWN, made)

    points = kill_points(lambda: job(memory / "count"))
    seen = set()
    for point in range(1 + points % stride, points + 1, stride):
        root = memory / f"kill-{point}"
        assert run_killed(lambda root=root: job(root), point) == -signal.SIGKILL
        after = kept(root)
        found = after.find("errors", OWN)
        assert found is None or same(found), point
        assert after.findings == [], "a kill must never look like damage"
        seen.add(found is None)
        job(root)
        assert same(kept(root).find("errors", OWN))
    assert seen == {True, False}


def test_two_processes_compute_one_once(tmp_path: Path) -> None:
    def job(number: int) -> None:
        def compute_it() -> dict[str, torch.Tensor]:
            (tmp_path / f"computed-{number}").touch()
            return made()

        assert same(kept(tmp_path / "store").of("errors", OWN, compute_it))

    children = [fork(lambda number=number: job(number)) for number in range(4)]
    assert [status(pid) for pid in children] == [0] * 4
    assert len(list(tmp_path.glob("computed-*"))) == 1


def test_whoever_waits_is_told(tmp_path: Path) -> None:
    def hold() -> None:
        with kept(tmp_path / "store").turn("errors", OWN):
            (tmp_path / "held").touch()
            time.sleep(60)

    pid = fork(hold)
    limit = time.monotonic() + 20
    while not (tmp_path / "held").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    told: list[str] = []

    def note(said: str) -> None:
        told.append(said)
        os.kill(pid, signal.SIGKILL)
        status(pid)

    with Statistics(tmp_path / "store", PARTS, note=note).turn("errors", OWN):
        assert told == ["another run measures errors of this model; waiting for it"]


def test_a_store_that_refuses_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    statistics = kept(tmp_path)
    monkeypatch.setattr(os, "rename", full)
    assert same(statistics.of("errors", OWN, made))
    (finding,) = statistics.findings
    assert "could not be kept" in finding.message
    assert finding.severity is Severity.WARNING
    assert folders(tmp_path) == []


def test_verbs_of_the_cache_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = compute(tmp_path)
    kept(tmp_path).of("errors", OWN, made)
    (folder,) = folders(tmp_path)

    def cache(*arguments: str) -> str:
        assert entry(["cache", *arguments, "--cache-dir", str(tmp_path)]) in (0, 5)
        return " ".join(capsys.readouterr().out.split())

    assert "1 results, 1 statistics" in cache("ls")
    assert {each["type"] for each in json.loads(cache("ls", "--json"))} == {None, "statistics"}
    assert "own.bits: 4" in cache("explain", folder.name[:12])
    assert "1 results, 1 statistics" in cache("verify")
    os.utime(folder / "manifest.json", (1, 1))  # used long ago
    assert "freed" in cache("gc", "--max-size", f"{result.size}B")
    assert folders(tmp_path) == []
    assert Store(tmp_path).lookup(result.key) is not None
    kept(tmp_path).of("errors", OWN, made)
    (folder,) = folders(tmp_path)
    (folder / "files" / "values.safetensors").write_bytes(b"")
    assert "1 findings" in cache("verify")
    assert folders(tmp_path) == []
