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

_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4: clean pages of a file are dropped, changed ones stay
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


def let_go(tensor: torch.Tensor, files: list[tuple[int, int]]) -> int:
    """Drop the whole pages of ``tensor`` that lie in one of the mapped ``files``; returns their bytes.

    The content stays: it is read from the file again when it is looked at.
    """
    start = tensor.data_ptr()
    place = bisect_right(files, (start, 1 << 64)) - 1
    if place < 0 or start + tensor.nbytes > files[place][1]:
        return 0
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (start + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size <= 0:
        return 0
    return size if _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(size), _PAGEOUT) == 0 else 0


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
