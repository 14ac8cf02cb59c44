"""Children that are killed at a chosen moment, and the toy result they store."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olive.store.keys import key
from olive.store.store import Entry, Store

INPUTS = {"pass": "Toy", "params": {"r": 8}, "model": "0" * 64}
KEY = key(INPUTS)
FILES = {
    "model.onnx": b"a" * 70_000,
    "model.onnx.data": bytes(range(256)) * 1_000,
    "sub/tokenizer.json": b"{}",
}
# Kill at every third moment, or, in the full run, at every one.
EVERY = pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.full)])
_CALLS = {"write", "fsync", "flush", "close", "utime", "ioctl", "flock", "sendfile"}


def produce(folder: Path, files: dict[str, bytes] = FILES) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for start in range(0, len(content), 65_536):
                file.write(content[start : start + 65_536])


def compute(root: Path, *, key: str = KEY, files: dict[str, bytes] = FILES) -> Entry:
    """What an engine does for one step."""
    store = Store(root)
    if (entry := store.lookup(key)) is None:
        with store.stage() as staging:
            produce(staging.path, files)
            entry = store.publish(staging, key, {"seconds": 1.5}, INPUTS)
    return entry


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def delivered(folder: Path) -> dict[str, bytes]:
    """Contents of an output folder, without our marker."""
    return {name: data for name, data in contents(folder).items() if name != ".olive-output.json"}


def fork(job: Callable[[], Any]) -> int:
    """Run ``job`` in a child; its exit status is 0 where it returned."""
    pid = os.fork()
    if pid:
        return pid
    try:
        job()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the child must not return into the parent's test run
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def arm(kill_at: int | None) -> list[int]:
    """Count this process's file operations, and kill it right before number ``kill_at``.

    Audit events (open, rename, mkdir, unlink, ...) and the calls that have none (write, fsync, close, ...).
    """
    count = [0]

    def step() -> None:
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.", "fcntl.", "ctypes.dl")):
            step()

    def profile(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and called.__name__ in _CALLS:
            step()

    sys.addaudithook(audit)
    sys.setprofile(profile)
    return count


def kill_points(job: Callable[[], Any]) -> int:
    """How many moments ``job`` has at which it can be killed."""
    reader, writer = os.pipe()

    def counted() -> None:
        count = arm(None)
        job()
        sys.setprofile(None)
        os.write(writer, str(count[0]).encode())

    assert status(fork(counted)) == 0
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())


def run_killed(job: Callable[[], Any], kill_at: int) -> int:
    def armed() -> None:
        arm(kill_at)
        job()

    return status(fork(armed))
