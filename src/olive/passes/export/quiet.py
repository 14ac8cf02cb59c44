"""Keep what a talkative library writes, and show it only when it matters."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO


class Captured:
    """Everything written to standard output and error, also by native code."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def tail(self, lines: int = 20) -> str:
        """The last lines; of a progress bar, only its last state."""
        self._file.flush()
        self._file.seek(0)
        said = [line.rstrip().rsplit("\r", 1)[-1] for line in self._file.read().split("\n")]
        return "\n".join([line for line in said if line][-lines:])


@contextmanager
def captured() -> Iterator[Captured]:
    """Redirect file descriptors 1 and 2, ``sys.stdout`` and ``sys.stderr`` to a temporary file.

    The root logger is put back afterwards: onnxruntime's quantiser calls ``logging.basicConfig`` on import.
    Descriptors belong to the whole process: what other threads write meanwhile is kept here too.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # By line, so that it stays in order with native code; newlines as they are, to tell progress bars by.
    with tempfile.TemporaryFile("w+", 1, encoding="utf-8", newline="", errors="replace") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved: list[tuple[int, int]] = []
        try:
            for number in (1, 2):
                try:
                    saved.append((number, os.dup(number)))
                except OSError:  # a service may run with these closed
                    continue
                os.dup2(file.fileno(), number)
            with redirect_stdout(file), redirect_stderr(file):
                yield Captured(file)
        finally:
            file.flush()
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)
            root.handlers[:] = handlers
            root.setLevel(level)
