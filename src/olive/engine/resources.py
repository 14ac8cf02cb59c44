"""Memory, disk and permissions that the steps to run need."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from olive.errors import EnvironmentFault, Problem, Severity
from olive.hardware.machine import Machine
from olive.hardware.probe import disk_free

if TYPE_CHECKING:
    from olive.engine.plan import PlannedStep

MARGIN = 256 << 20  # bytes of disk kept free beside the estimates


def check_resources(steps: Iterable[PlannedStep], machine: Machine, root: Path) -> Iterator[Problem]:
    """What is short on the machine, or on the disk that ``root`` is on."""
    to_run = [step for step in steps if not step.cached]
    disk = sum(step.cost.disk for step in to_run)
    try:
        free = disk_free(root)
    except EnvironmentFault as error:
        yield from error.problems
        return
    if to_run and free < disk + MARGIN:
        yield Problem(
            f"the run writes about {disk:,} bytes, and {root} has {free:,} free",
            "cache_dir",
            "Free space, run `olive cache gc`, or set cache_dir to a larger disk.",
            exit_code=5,
        )
    for step in to_run:
        if step.cost.memory > machine.memory_available:
            yield Problem(
                f"needs about {step.cost.memory / 2**30:.1f} GiB of memory, and "
                f"{machine.memory_available / 2**30:.1f} GiB are available",
                f"passes.{step.name}",
                "Close other programs, lower max_seq_len or the batch size, or use a larger machine.",
                Severity.ERROR if step.cost.memory > machine.memory else Severity.WARNING,
                5,
            )


def check_writable(root: Path, out: Path) -> Iterator[Problem]:
    """Folders that cannot be written."""
    for folder, name in ((root, "cache_dir"), (out, "output_dir")):
        nearest = folder
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
            yield Problem(
                f"{folder} cannot be written: no permission for {nearest}",
                name,
                "Give write permission, or name another folder.",
                exit_code=5,
            )
