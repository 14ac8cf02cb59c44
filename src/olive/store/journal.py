"""The journal of a long step: checkpoints that are whole or absent, so that a killed step goes on."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olive.errors import EnvironmentFault, OliveError, Problem, Severity
from olive.store.faults import environment_fault, full_disk, reported
from olive.store.integrity import (
    FILES,
    FORMAT,
    DamagedError,
    check_files,
    parse_table,
    read_manifest,
    settle,
    size_of,
    sync,
    tabulate,
    write_manifest,
)

_NAME = re.compile(r"ckpt-(\d+)")
_KEEP = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified state to go on from.

    Attributes:
        step: how far it was.
        path: folder of the files that ``write`` made.
        state: the JSON state given with them.
    """

    step: int
    path: Path
    state: dict[str, Any]


class Journal:
    """Checkpoints of one step in progress. One process at a time writes here: ``Store.claim`` sees to that.

    Args:
        folder: its own folder; made when first written to.

    Attributes:
        path: that folder.
        findings: what was wrong with checkpoints that were passed over.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.findings: list[Problem] = []

    def commit(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        """Keep a checkpoint: all of it, or, after a kill at any moment, none; the newest two stay.

        Args:
            step: how far the step is; counts up.
            write: writes the files of the checkpoint into the empty folder it is given.
            state: JSON facts beside them (position in the data, random state, losses so far).

        Raises:
            EnvironmentFault: the disk is full or refuses; earlier checkpoints are kept.
        """
        fresh = self.path / f"ckpt-{step}.tmp"
        final = self.path / f"ckpt-{step}"
        with reported(self.path, "writing a checkpoint"):
            self._sweep()
            (fresh / FILES).mkdir(parents=True)
        try:
            write(fresh / FILES)
            settle(fresh / FILES)
            files = tabulate(fresh / FILES)
            write_manifest(fresh, {"format": FORMAT, "step": step, "state": state, "files": files})
            if final.exists():
                os.rename(final, self._aside("replaced"))
            os.rename(fresh, final)
            sync(self.path)
        except Exception as error:
            if isinstance(error, OliveError) or (fault := self._fault(error, fresh)) is None:
                raise
            raise fault from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        with reported(self.path, "removing an old checkpoint"):
            self._prune(step)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is what was written, to the byte; damaged ones are set aside.

        Raises:
            EnvironmentFault: a checkpoint cannot be read for a reason that is no damage; it is kept.
        """
        with reported(self.path, "reading a checkpoint"):
            for step, folder in sorted(self._kept(), reverse=True):
                try:
                    return self._read(step, folder)
                except DamagedError as damage:
                    self.findings.append(
                        Problem(
                            f"checkpoint {step} is damaged ({damage}): an older one is used",
                            where=str(folder),
                            severity=Severity.WARNING,
                            exit_code=5,
                        )
                    )
                    os.rename(folder, self._aside("damaged"))
        return None

    def clear(self) -> None:
        """Remove everything: the step is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _read(self, step: int, folder: Path) -> Checkpoint:
        body = read_manifest(folder)
        if body.get("step") != step or not isinstance(body.get("state"), dict):
            raise DamagedError("the manifest belongs to another checkpoint")
        check_files(folder / FILES, parse_table(body.get("files")), content=True)
        return Checkpoint(step, folder / FILES, body["state"])

    def _kept(self) -> Iterator[tuple[int, Path]]:
        if not self.path.exists():
            return
        for folder in self.path.iterdir():
            if matched := _NAME.fullmatch(folder.name):
                yield int(matched[1]), folder

    def _prune(self, newest: int) -> None:
        """Keep ``newest`` and the one before; renamed first, so that half a removal never looks damaged."""
        older = sorted((step for step, _ in self._kept() if step < newest), reverse=True)
        for step in older[_KEEP - 1 :]:
            aside = self._aside("pruned")
            os.rename(self.path / f"ckpt-{step}", aside)
            shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what a killed commit left."""
        for leftover in (*self.path.glob("*.tmp"), *self.path.glob("*.aside")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _aside(self, why: str) -> Path:
        return self.path / f"{why}-{uuid.uuid4().hex}.aside"

    def _fault(self, error: Exception, fresh: Path) -> EnvironmentFault | None:
        cause = full_disk(error, self.path)
        if cause is None and isinstance(error, OSError):
            cause = error
        if cause is None:
            return None
        return environment_fault(cause, self.path, "writing a checkpoint", needed=size_of(fresh))
