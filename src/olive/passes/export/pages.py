"""Weights leave memory once they have been written.

A model's files are mapped into memory; the pages that were read would stay until the end, a whole model.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# MADV_PAGEOUT, Linux 5.4, keeps changed pages, and pages that another process maps too
_PAGEOUT, _DONTNEED = 21, 4
_MAPS = Path("/proc/self/maps")


def mapped(*endings: str) -> list[tuple[int, int]]:
    """Address ranges that map files whose path ends so, in order; empty where none can be told."""
    found = []
    try:
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.endswith(endings):
                first, _, last = line.split(" ", 1)[0].partition("-")
                found.append((int(first, 16), int(last, 16)))
    except (OSError, ValueError):
        return []
    return found


def let_go(tensor: torch.Tensor, files: list[tuple[int, int]], *, unchanged: bool = False) -> int:
    """Drop the whole pages of ``tensor`` that lie in one of the mapped ``files``; returns their bytes.

    The content stays: it is read from the file again when it is looked at. With ``unchanged`` the caller says
    that nothing has written to the mapping; pages then go even where other processes read the same file.
    """
    start = tensor.data_ptr()
    place = bisect_right(files, (start, 1 << 64)) - 1
    if place < 0 or start + tensor.nbytes > files[place][1]:
        return 0
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (start + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size <= 0:
        return 0
    advice = _DONTNEED if unchanged else _PAGEOUT
    return size if _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(size), advice) == 0 else 0


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
