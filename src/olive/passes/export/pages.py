"""Weights leave memory once the builder has copied them.

transformers maps a model's file into memory, and the builder copies every weight into its own graph before it
quantises one; the mapped pages would stay until the end, a whole model beside the copy.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4: clean pages of a file are dropped, changed ones stay
_MAPS = Path("/proc/self/maps")


@contextmanager
def pages_let_go() -> Iterator[None]:
    """Let go of the mapped pages of each tensor as onnx-ir reads it out; without effect but on Linux."""
    try:
        from onnx_ir.tensor_adapters import TorchTensor

        plain = TorchTensor.tobytes
    except (ImportError, AttributeError):
        yield
        return
    files: list[tuple[int, int]] = []

    def tobytes(self: Any) -> bytes:
        data: bytes = plain(self)
        if not files:
            files.extend(mapped(".safetensors") or [(0, 0)])
        let_go(self.raw, files)
        return data

    TorchTensor.tobytes = tobytes  # type: ignore[method-assign]
    try:
        yield
    finally:
        TorchTensor.tobytes = plain  # type: ignore[method-assign]


def mapped(suffix: str) -> list[tuple[int, int]]:
    """Address ranges that map files whose name ends in ``suffix``, in order; empty where none can be told."""
    found = []
    try:
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.endswith(suffix):
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
    madvise = ctypes.CDLL(None).madvise
    return size if madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _PAGEOUT) == 0 else 0
