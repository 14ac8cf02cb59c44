"""Rows 1, 5, 17, 18, 19 and 20 of the fault matrix: kills, races, leases."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from store_kit import (
    EVERY,
    FILES,
    INPUTS,
    KEY,
    compute,
    contents,
    fork,
    kill_points,
    produce,
    run_killed,
    status,
)

from olive.store.keys import key
from olive.store.store import Store


def whole(root: Path) -> bool | None:
    """None: a miss. Else whether the hit is the oracle's, to the byte."""
    store = Store(root)
    entry = store.lookup(KEY)
    found = None if entry is None else contents(entry.path) == FILES
    assert store.findings == [], "a kill must never look like damage"
    store.close()
    return found


@EVERY
def test_kill_at_every_file_operation_of_publish(memory: Path, stride: int) -> None:
    points = kill_points(lambda: compute(memory / "count"))
    assert points > 60
    seen = set()
    for point in range(1 + points % stride, points + 1, stride):
        root = memory / f"kill-{point}"
        assert run_killed(lambda root=root, point=point: compute(root), point) == -signal.SIGKILL
        found = whole(root)
        assert found in (None, True), point
        seen.add(found)
        compute(root)
        assert whole(root), point
        assert not list((root / "staging").iterdir()), f"kill {point}: the rerun left staging behind"
        shutil.rmtree(root)
    assert seen == {None, True}


def test_everything_is_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 6 in small: after a power cut the name can only point to what was synced before it."""
    done: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        found = [source, *source.rglob("*")]
        assert {str(path) for path in found} <= set(done)
        done.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    compute(tmp_path)
    assert done[-2:] == ["rename", str(tmp_path / "entries")]


def test_kill_at_random_moments(memory: Path) -> None:
    begin = time.monotonic()
    status(fork(lambda: compute(memory / "clean")))
    span = time.monotonic() - begin
    chance = random.Random(0)
    for number in range(60):
        root = memory / f"kill-{number}"
        pid = fork(lambda root=root: compute(root))
        time.sleep(chance.random() * span * 1.2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status(pid)
        assert whole(root) in (None, True)
        compute(root)
        assert whole(root)


def test_ctrl_c_leaves_no_staging(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def interrupted() -> None:
        with store.stage() as staging:
            produce(staging.path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "staging").iterdir())
    assert not list((tmp_path / "leases").glob("*.lease"))


def test_eight_writers_of_one_key(tmp_path: Path) -> None:
    for number in range(6):
        root = tmp_path / f"round-{number}"
        children = [fork(lambda root=root: compute(root)) for _ in range(8)]
        assert [status(pid) for pid in children] == [0] * 8
        assert whole(root)
        assert not list((root / "staging").iterdir())
        assert len(list(Store(root).entries())) == 1


def test_claim_lets_one_process_compute(tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()

    def step(number: int) -> None:
        store = Store(tmp_path / "store")
        with store.claim(KEY):
            if store.lookup(KEY) is None:
                (made / str(number)).touch()
                with store.stage() as staging:
                    produce(staging.path)
                    time.sleep(0.1)
                    store.publish(staging, KEY, {}, INPUTS)

    children = [fork(lambda number=number: step(number)) for number in range(4)]
    assert [status(pid) for pid in children] == [0] * 4
    assert len(list(made.iterdir())) == 1


def test_a_killed_claim_is_free_and_the_waiting_are_told(tmp_path: Path) -> None:
    def hold() -> None:
        with Store(tmp_path).claim(KEY):
            (tmp_path / "held").touch()
            time.sleep(60)

    pid = fork(hold)
    _await(tmp_path / "held")
    told: list[str] = []

    def kill() -> None:
        told.append("waiting")
        os.kill(pid, signal.SIGKILL)
        status(pid)

    with Store(tmp_path).claim(KEY, kill):
        assert told == ["waiting"]


def _await(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_readers_against_gc(tmp_path: Path) -> None:
    """A hit stays whole while its reader lives, whatever gc does; at worst a lookup is a miss."""
    root = tmp_path / "store"
    stop = tmp_path / "stop"
    keys = [key({"n": number}) for number in range(3)]

    def read() -> None:
        hits = 0
        while not stop.exists():
            for one in keys:
                store = Store(root)
                if (entry := store.lookup(one)) is not None:
                    time.sleep(0.002)
                    assert contents(entry.path) == FILES
                    hits += 1
                assert store.findings == []
                store.close()
        assert hits > 5

    def write() -> None:
        while not stop.exists():
            for one in keys:
                compute(root, key=one)

    def collect() -> None:
        freed = 0
        while not stop.exists():
            store = Store(root)
            freed += store.gc(max_bytes=0)
            assert store.findings == []
        assert freed > 0

    children = [fork(job) for job in (read, read, write, collect)]
    time.sleep(2.5)
    stop.touch()
    assert [status(pid) for pid in children] == [0] * 4


@pytest.mark.parametrize(("sign", "protected"), [(signal.SIGSTOP, True), (signal.SIGKILL, False)])
def test_a_lease_lives_as_long_as_its_holder(tmp_path: Path, sign: signal.Signals, protected: bool) -> None:
    """A stopped holder keeps its lease however long it stands; a dead one loses it at once."""
    compute(tmp_path)

    def hold() -> None:
        with Store(tmp_path).lease(KEY):
            (tmp_path / "held").touch()
            time.sleep(60)

    pid = fork(hold)
    _await(tmp_path / "held")
    os.kill(pid, sign)
    if sign == signal.SIGKILL:
        status(pid)
    store = Store(tmp_path)
    freed = store.gc(max_bytes=0)
    assert (freed == 0) == protected
    assert ((tmp_path / "entries" / KEY).exists()) == protected
    if protected:
        assert store.remove(KEY) == 0
        os.kill(pid, signal.SIGKILL)
        status(pid)
        assert store.remove(KEY) > 0


def test_leftover_staging_is_reported_then_swept(tmp_path: Path) -> None:
    def die() -> None:
        with Store(tmp_path).stage() as staging:
            produce(staging.path)
            os.kill(os.getpid(), signal.SIGKILL)

    assert status(fork(die)) == -signal.SIGKILL
    store = Store(tmp_path)
    assert [problem.severity.value for problem in store.verify()] == ["note"]
    assert "process is gone" in store.verify()[0].message
    with store.stage() as alive:
        assert store.verify() == []
        assert store.gc() == 0
        assert alive.path.exists()
    assert not list((tmp_path / "staging").iterdir())


def test_gc_frees_leftover_staging(tmp_path: Path) -> None:
    def die() -> None:
        with Store(tmp_path).stage() as staging:
            produce(staging.path)
            os.kill(os.getpid(), signal.SIGKILL)

    status(fork(die))
    assert Store(tmp_path).gc() == sum(map(len, FILES.values()))
