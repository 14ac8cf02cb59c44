"""``python -m olive.systems.worker job.json``: run one job in a process of its own.

The result is written beside the job as ``result.json``; the exit code is that of the error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from olive.config.workflow import link
from olive.errors import OliveError
from olive.systems.job import Job
from olive.systems.local import execute


class LineProgress:
    """Progress as plain lines on standard error, for logs."""

    def start(self, task: str, total: int | None = None) -> None:
        """Say that a task begins."""
        print(task, file=sys.stderr, flush=True)

    def update(self, done: int, **fields: float | str) -> None:
        """Say nothing: a log needs no bar."""

    def finish(self) -> None:
        """Say nothing."""

    def note(self, message: str) -> None:
        """Say one thing."""
        print(message, file=sys.stderr, flush=True)


def main(path: Path) -> int:
    """Run the job at ``path``; return its exit code."""
    job = Job.model_validate_json(path.read_bytes())
    link(tuple(job.data.values()))
    try:
        result, _ = execute(job, LineProgress())
    except OliveError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    path.with_name("result.json").write_text(result.model_dump_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
