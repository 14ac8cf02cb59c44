"""``python -m olive.systems.worker job.json``: run one job in a process of its own, or as one of several.

Its place among several is told by torch's variables. The first writes ``result.json`` beside the job; a
failure is written as ``error-RANK.json`` and the exit code is that of the error. What is said on the way goes
to standard output, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from olive.config.workflow import link
from olive.errors import InternalError, OliveError
from olive.passes.base import Place
from olive.systems.job import Job
from olive.systems.local import execute


class JsonProgress:
    """Progress as JSON lines, for whoever started the worker."""

    def __init__(self, quiet: bool) -> None:
        # what libraries print must not stand among the lines
        self.lines = None if quiet else os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def _say(self, call: str, *values: Any, **fields: Any) -> None:
        if self.lines is not None:
            line = json.dumps({"call": call, "with": values, "fields": fields})
            try:
                print(line, file=self.lines, flush=True)
            except OSError:
                self.lines = None

    def start(self, task: str, total: int | None = None) -> None:
        """Begin a task."""
        self._say("start", task, total)

    def update(self, done: int, **fields: float | str) -> None:
        """So much is done."""
        self._say("update", done, **fields)

    def finish(self) -> None:
        """The task is over."""
        self._say("finish")

    def note(self, message: str) -> None:
        """Say one thing."""
        self._say("note", message)


def place(job: Job) -> Place:
    """This process's place, by torch's variables; on a GPU machine it sees one device from then on."""
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and job.accelerator.device == "gpu":
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[local] if local < len(seen) else str(local)
    return Place(
        rank=rank,
        size=size,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
        strategy=job.strategy,
        attempt=int(os.environ.get("OLIVE_ATTEMPT", "0")),
    )


def main(path: Path) -> int:
    """Run the job at ``path``; return its exit code."""
    job = Job.model_validate_json(path.read_bytes())
    link(tuple(job.data.values()))
    here = place(job)
    if "OLIVE_ATTEMPT" in os.environ:
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory(prefix="olive-worker-") as scratch:
            if here.rank:
                job = job.model_copy(update={"out": Path(scratch)})
            result, _ = execute(job, JsonProgress(quiet=here.rank > 0), here)
    except KeyboardInterrupt:
        return 130
    except OliveError as error:
        return _failed(path, here.rank, error)
    except Exception as error:  # noqa: BLE001 - whoever started us has to be told
        return _failed(path, here.rank, InternalError(f"{type(error).__name__}: {error}"))
    if here.rank == 0:
        path.with_name("result.json").write_text(result.model_dump_json(), encoding="utf-8")
    return 0


def _failed(path: Path, rank: int, error: OliveError) -> int:
    traceback.print_exception(error)
    said = {"kind": type(error).__name__, "problems": [asdict(problem) for problem in error.problems]}
    path.with_name(f"error-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    return error.exit_code


def _end_with_the_parent() -> None:
    """End when whoever holds the other end of standard input is gone."""
    try:
        while os.read(0, 1 << 12):
            pass
    finally:
        os._exit(137)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
