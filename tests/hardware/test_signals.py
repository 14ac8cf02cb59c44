"""Signals while work goes on: caught, put back, left alone where ignored, and never without effect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import pytest

from olive.hardware.signals import caught, end_by

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_caught_until_the_end(number: int) -> None:
    seen: list[int] = []

    def take(arrived: int, frame: FrameType | None) -> None:
        seen.append(arrived)

    before = {each: signal.getsignal(each) for each in BOTH}
    with caught(take) as usual:
        os.kill(os.getpid(), number)
        usual()
        assert {each: signal.getsignal(each) for each in BOTH} == before
    assert {each: signal.getsignal(each) for each in BOTH} == before
    assert seen == [number]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with caught(lambda *_: pytest.fail("called")):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_catches_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        with caught(lambda *_: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number", BOTH)
def test_the_end_comes_where_the_signal_does_nothing(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended:
            end_by(number)
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number


def test_the_end_is_the_signals_own() -> None:
    code = "import signal; from olive.hardware.signals import end_by; end_by(signal.SIGTERM)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
