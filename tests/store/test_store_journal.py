"""Row 30 of the fault matrix: kills at every write of a checkpoint, damaged checkpoints."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest
from store_kit import EVERY, fork, kill_points, run_killed, status

from olive.errors import EnvironmentFault
from olive.store import integrity
from olive.store.journal import Journal

STEPS = 3


def train(folder: Path, committed: Path | None = None) -> str:
    """A toy training whose end depends on every step; goes on from the journal."""
    journal = Journal(folder)
    newest = journal.newest()
    first, state = (newest.step, newest.state["digest"]) if newest else (0, "")
    if newest:
        assert (newest.path / "weights.bin").read_bytes() == state.encode() * 100
        assert (newest.path / "sub" / "optimizer.bin").read_bytes() == b"o" * 1000
    for step in range(first + 1, STEPS + 1):
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
        journal.commit(step, lambda path, state=state: save(path, state), {"digest": state})
        if committed:
            with committed.open("a") as file:
                file.write(f"{step}\n")
    return state


def save(folder: Path, state: str) -> None:
    (folder / "weights.bin").write_bytes(state.encode() * 100)
    (folder / "sub").mkdir()
    (folder / "sub" / "optimizer.bin").write_bytes(b"o" * 1000)


@EVERY
def test_kill_at_every_file_operation_of_training(memory: Path, stride: int) -> None:
    oracle = train(memory / "clean")
    points = kill_points(lambda: train(memory / "count", memory / "log"))
    assert points > 100
    for point in range(1 + points % stride, points + 1, stride):
        folder, log = memory / f"kill-{point}", memory / f"log-{point}"
        assert run_killed(lambda folder=folder, log=log: train(folder, log), point) == -signal.SIGKILL
        promised = max(map(int, log.read_text().split()), default=0) if log.exists() else 0
        journal = Journal(folder)
        newest = journal.newest()
        assert (newest.step if newest else 0) >= promised, point
        assert journal.findings == [], "a kill must never look like damage"
        assert train(folder) == oracle, point
        journal.clear()
        assert not folder.exists()


@pytest.mark.parametrize("name", ["manifest.json", "files/weights.bin", "files/sub/optimizer.bin"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    oracle = train(tmp_path)
    path = tmp_path / f"ckpt-{STEPS}" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[:-1])
    journal = Journal(tmp_path)
    newest = journal.newest()
    assert newest is not None
    assert newest.step == STEPS - 1
    assert f"checkpoint {STEPS} is damaged" in journal.findings[0].message
    assert train(tmp_path) == oracle


def test_a_renamed_checkpoint_is_no_checkpoint_of_that_step(tmp_path: Path) -> None:
    train(tmp_path)
    os.rename(tmp_path / f"ckpt-{STEPS}", tmp_path / "ckpt-9")
    newest = Journal(tmp_path).newest()
    assert newest is not None
    assert newest.step == STEPS - 1


def test_all_damaged_is_none(tmp_path: Path) -> None:
    train(tmp_path)
    for path in tmp_path.rglob("manifest.json"):
        path.write_text("{}")
    journal = Journal(tmp_path)
    assert journal.newest() is None
    assert len(journal.findings) == 2


def test_after_damage_good_checkpoints_are_not_pruned_for_bad(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (10, 20, 30):
        journal.commit(step, lambda path: save(path, "s"), {})
    (tmp_path / "ckpt-30" / "manifest.json").write_text("{}")
    assert journal.newest()
    journal.commit(25, lambda path: save(path, "s"), {})
    assert sorted(path.name for path in tmp_path.glob("ckpt-*")) == ["ckpt-20", "ckpt-25"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit(1, lambda path: save(path, "a"), {"n": "a"})
    journal.commit(1, lambda path: save(path, "b"), {"n": "b"})
    newest = journal.newest()
    assert newest is not None
    assert newest.state == {"n": "b"}
    assert (newest.path / "weights.bin").read_bytes() == b"b" * 100


def test_an_error_while_writing_keeps_what_was_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.commit(1, lambda path: save(path, "a"), {})

    def broken(folder: Path) -> None:
        save(folder, "b")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        journal.commit(2, broken, {})
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-1"]


def test_unreadable_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "file_digest", broken)
        with pytest.raises(EnvironmentFault, match="input/output error"):
            Journal(tmp_path).newest()
    newest = Journal(tmp_path).newest()
    assert newest is not None
    assert newest.step == STEPS


def test_clear_and_an_empty_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "none")
    assert journal.newest() is None
    assert not journal.path.exists()
    train(journal.path)
    journal.clear()
    assert journal.newest() is None
    assert status(fork(journal.clear)) == 0
