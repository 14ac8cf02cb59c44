"""The output folder: ours alone, never anyone else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from olive.errors import Problem
from olive.store.faults import reported
from olive.store.materialise import refusal

MODEL = "model"
MARKER = "run.json"
TRACKING = "tracking"  # of experiment trackers: there before a run ends, and nothing in it is ever replaced
OURS = frozenset({MODEL, MARKER, "report.html", "README.md", "model_config.json"})


def check_output(folder: Path, cache: Path) -> Iterator[Problem]:
    """Refuse a folder that holds files which no run of ours has put there, or which were edited since.

    The cache may lie inside the output folder, as published documents have it.
    """
    if folder.exists() and not folder.is_dir():
        yield Problem(f"{folder} is a file", "output_dir", "Name a folder.")
        return
    if not folder.is_dir():
        return
    foreign = []
    ran = (folder / MARKER).is_file() or (folder / MODEL / ".olive-output.json").is_file()
    for path in sorted(folder.iterdir()):
        in_cache = path == cache or cache.is_relative_to(path)
        temporary = path.name.startswith((".olive-", f".{MODEL}"))
        if not (in_cache or temporary or path.name == TRACKING or (ran and path.name in OURS)):
            foreign.append(path.name)
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        yield Problem(
            f"{folder} holds files that no run of ours has put there ({shown}); nothing is deleted",
            "output_dir",
            "Name an empty folder, or move these files away.",
        )
    with reported(folder / MODEL, "looking at the output folder"):
        refused = refusal(folder / MODEL)
    if refused is not None:
        yield Problem(refused, "output_dir", "Name another output folder, or move those files away.")
