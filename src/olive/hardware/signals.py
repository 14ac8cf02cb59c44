"""Ctrl-C and SIGTERM while work goes on that should end in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def caught(handler: Handler) -> Iterator[Callable[[], None]]:
    """Have SIGINT and SIGTERM call ``handler``; gives what puts the usual handlers back before the end.

    A signal that this process was started to ignore, as ``nohup`` and a shell's ``&`` do, stays ignored. In
    another thread than the main one nothing is caught.
    """
    before: dict[int, signal.Handlers | int | Handler | None] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)

    def usual() -> None:
        for number, earlier in before.items():
            signal.signal(number, earlier)

    try:
        yield usual
    finally:
        usual()


def end_by(number: int) -> NoReturn:
    """Do what the signal does; where that is nothing, end all the same: what was stopped is not finished."""
    signal.raise_signal(number)
    raise SystemExit(128 + number)
