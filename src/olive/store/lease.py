"""Leases: who uses what, so that nothing in use is removed.

A lease is a file locked through the operating system. The kernel lets go of it when its holder ends, in
whatever way, and keeps it while the holder is merely slow or stopped: no process id is trusted, and no clock.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from olive.errors import EnvironmentFault

_PATIENCE = 120.0


class Lease:
    """One holder's use of a name, until released."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(str(path), thread_local=False)
        self._lock.acquire(timeout=0)

    def release(self) -> None:
        """Stop using it. Safe to call twice."""
        if self._lock.is_locked:
            self._path.unlink(missing_ok=True)
            self._lock.release(force=True)


class Leases:
    """All leases of a store.

    Args:
        folder: where the lock files live.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, name: str) -> Lease:
        """Use ``name``, together with any number of other holders."""
        with self._mutex():
            return Lease(self._folder / f"{name}.{uuid.uuid4().hex}.lease")

    @contextlib.contextmanager
    def idle(self, name: str) -> Iterator[bool]:
        """Whether nobody uses ``name``; while the context is open, nobody can begin to. Keep it short."""
        with self._mutex():
            yield not any([self._held(path) for path in self._folder.glob(f"{name}.*.lease")])

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Do something under ``name`` that one process at a time may do; waits for its turn."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self._folder / f"{name}.lock"), thread_local=False):
            yield

    def sweep(self) -> None:
        """Remove the files of holders that were killed."""
        with self._mutex():
            for path in self._folder.glob("*.lease"):
                self._held(path)

    def free(self, name: str) -> bool:
        """Whether nobody is inside ``alone(name)``."""
        path = self._folder / f"{name}.lock"
        return not path.exists() or not _locked(path)

    def _mutex(self) -> contextlib.AbstractContextManager[object]:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "mutex.lock"
        try:
            return FileLock(str(path), thread_local=False).acquire(timeout=_PATIENCE, poll_interval=0.01)
        except Timeout as error:
            raise EnvironmentFault(
                f"another process has kept the store locked for {_PATIENCE:.0f} s",
                where=str(path),
                fix="see whether an olive process is stopped or its disk hangs",
            ) from error

    @staticmethod
    def _held(path: Path) -> bool:
        """Whether its holder lives; a dead holder's file is removed."""
        if _locked(path):
            return True
        path.unlink(missing_ok=True)
        return False


def _locked(path: Path) -> bool:
    lock = FileLock(str(path), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release(force=True)
    return False
