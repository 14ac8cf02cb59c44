"""Memory of this process: its peak, and what the collector does with it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_COLLECT_AFTER = 100_000


def collect_seldom() -> None:
    """Let the collector run after 100,000 new objects instead of 700.

    Importing torch and transformers makes half a million that stay; by default they are walked over again
    and again while the libraries load, a quarter of that time.
    """
    gc.set_threshold(max(_COLLECT_AFTER, gc.get_threshold()[0]), 20, 20)


def exempt_libraries() -> None:
    """Keep the collector from walking over what is alive: to be called between imports and data."""
    gc.freeze()


def peak_memory() -> int:
    """Peak resident bytes of this process, since ``reset_peak_memory`` where the system can reset it."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start a new peak from the present use; without effect where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def release_memory() -> None:
    """Free what is unreachable and give freed heap pages back to the system, where the C library can.

    What survives, by now mostly the libraries' own million of objects, is then exempt from collections, which
    would walk over it again and again. To be called where nothing large is alive that will die later.
    """
    gc.collect()
    gc.freeze()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
