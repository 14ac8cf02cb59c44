"""Progress in the terminal: a bar where there is one, else an occasional line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from olive.report import figures, redact

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY = 30.0  # seconds between two lines of one task in a log


def progress_for(stream: TextIO | None = None) -> RichProgress | LogProgress:
    """A bar when ``stream`` (standard error) is a terminal, else lines."""
    stream = stream or sys.stderr
    return RichProgress(stream) if stream.isatty() else LogProgress(stream)


def fields_text(fields: dict[str, float | str]) -> str:
    """``loss 0.412  312 tokens/s``."""
    parts = []
    for name, value in fields.items():
        if name in ("tokens_per_second", "tokens/s"):
            parts.append(f"{float(value):,.0f} tokens/s")
        elif name.endswith("seconds_left"):
            continue
        else:
            shown = figures.number(float(value)) if isinstance(value, (int, float)) else value
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return "  ".join(parts)


class LogProgress:
    """Lines for a log: when a task starts, every half minute, and when it ends."""

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._task = ""
        self._total: int | None = None
        self._started = self._said = clock()

    def start(self, task: str, total: int | None = None) -> None:
        """Begin a task of ``total`` units."""
        self._task, self._total = task, total
        self._started = self._said = self._clock()
        self.note(f"{task} ...")

    def update(self, done: int, **fields: float | str) -> None:
        """Say how far the task is, at most every half minute."""
        now = self._clock()
        if now - self._said < _LINE_EVERY:
            return
        self._said = now
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and 0 < done < self._total:
            left = f"  {figures.duration((now - self._started) / done * (self._total - done))} left"
        self.note(f"{self._task} {done}{of}  {fields_text(fields)}{left}".rstrip())

    def finish(self) -> None:
        """The current task is over."""
        took = self._clock() - self._started
        if self._task and took >= 1:
            self.note(f"{self._task}: done in {figures.duration(took)}")
        self._task = ""

    def note(self, message: str) -> None:
        """Say one thing."""
        print(redact.text(message), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is held."""


class RichProgress:
    """One bar with its fields, rate and time left."""

    def __init__(self, stream: TextIO | None = None, **console: Any) -> None:
        from rich.console import Console

        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True, **console)
        self._bar: Progress | None = None
        self._id: TaskID | None = None

    def start(self, task: str, total: int | None = None) -> None:
        """Begin a task of ``total`` units."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        self.close()
        # The fields come last and may be cut: the bar itself has to survive a narrow terminal.
        middle = [MofNCompleteColumn(), TimeRemainingColumn()] if total else [TimeElapsedColumn()]
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20),
            *middle,
            TextColumn(
                "{task.fields[shown]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            transient=True,
        )
        self._id = self._bar.add_task(task, total=total, shown="")
        self._bar.start()

    def update(self, done: int, **fields: float | str) -> None:
        """Move the bar."""
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, completed=done, shown=fields_text(fields))

    def finish(self) -> None:
        """The current task is over: its bar gives way to one line."""
        if self._bar is None or self._id is None:
            return
        task = self._bar.tasks[0]
        took, shown = task.elapsed or 0.0, str(task.fields.get("shown", ""))
        self.close()
        if took >= 1:
            self.note(f"{task.description}: {figures.duration(took)}" + (f"  {shown}" if shown else ""))

    def note(self, message: str) -> None:
        """Say one thing, above the bar."""
        self._console.print(redact.text(message), markup=False, style="dim")

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._id = None
