"""The peak of this process, and a collector that leaves the libraries alone."""

from __future__ import annotations

import gc
import sys
import weakref

from olive.hardware.memory import collect_seldom, peak_memory, release_memory, reset_peak_memory


def test_peak_memory_sees_an_allocation_and_can_be_reset() -> None:
    reset_peak_memory()
    before = peak_memory()
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory() - before > 150 << 20
    del block
    if sys.platform == "linux":
        reset_peak_memory()
        assert peak_memory() - before < 100 << 20


class Node:
    """One end of a cycle."""


def test_release_frees_cycles_and_then_exempts_what_lives() -> None:
    node = Node()
    node.me = node  # type: ignore[attr-defined]
    gone, frozen = weakref.ref(node), gc.get_freeze_count()
    del node
    try:
        release_memory()
        assert gone() is None
        assert gc.get_freeze_count() > frozen
        later = Node()
        later.me = later  # type: ignore[attr-defined]
        gone = weakref.ref(later)
        del later
        release_memory()
        assert gone() is None
    finally:
        gc.unfreeze()


def test_the_collector_runs_seldom_and_never_more_often_than_before() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        collect_seldom()
        assert gc.get_threshold()[0] >= 100_000
        gc.set_threshold(500_000, 10, 10)
        collect_seldom()
        assert gc.get_threshold()[0] == 500_000
    finally:
        gc.set_threshold(*before)
