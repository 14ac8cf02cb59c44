"""What crashes and damage leave behind: found, told and removed."""

from __future__ import annotations

import contextlib
import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path

from olive.errors import Problem, Severity
from olive.store.faults import human
from olive.store.integrity import size_of, walk
from olive.store.lease import Leases

_ABANDONED = 30 * 24 * 3600.0


class Leftovers:
    """Staging folders without a process, damaged entries set aside, checkpoints nobody goes on from.

    Args:
        root: the store's folder.
        leases: who uses what.
    """

    def __init__(self, root: Path, leases: Leases) -> None:
        self._root = root
        self._leases = leases

    def staging(self) -> list[Path]:
        """Staging folders whose process is gone."""
        stale = []
        for folder in sorted((self._root / "staging").glob("staging-*")):
            with self._leases.idle(folder.name) as idle:
                if idle:
                    stale.append(folder)
        return stale

    def quarantine(self) -> list[Path]:
        """Damaged entries set aside."""
        return sorted((self._root / "quarantine").glob("*"))

    def work(self) -> list[Path]:
        """Journals of steps that are stored, or that nobody touched for a month."""
        now = datetime.datetime.now(datetime.UTC).timestamp()
        return [
            folder
            for folder in sorted((self._root / "work").glob("*"))
            if ((self._root / "entries" / folder.name).exists() or now - _touched(folder) > _ABANDONED)
            and self._leases.free(f"claim-{folder.name}")
        ]

    def sweep_staging(self) -> int:
        """Remove what ``staging`` finds; returns bytes freed."""
        return sum(discard(folder) for folder in self.staging())

    def sweep(self) -> int:
        """Remove all of it; returns bytes freed."""
        self._leases.sweep()
        return sum(discard(folder) for folder in (*self.staging(), *self.quarantine(), *self.work()))

    def problems(self) -> Iterator[Problem]:
        """One note for each."""
        kinds = (
            ("a staging folder whose process is gone", self.staging()),
            ("a damaged entry set aside", self.quarantine()),
            ("checkpoints of a step that is finished or long abandoned", self.work()),
        )
        for what, folders in kinds:
            for folder in folders:
                yield Problem(
                    f"{what} takes {human(size_of(folder))}",
                    where=str(folder),
                    fix="`olive cache gc` removes it",
                    severity=Severity.NOTE,
                    exit_code=5,
                )


def discard(folder: Path) -> int:
    """Remove a folder of ours; returns the bytes it took."""
    size = size_of(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return size


def _touched(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return max([folder.stat().st_mtime, *(status.st_mtime for _, status in walk(folder))])
    return 0.0
