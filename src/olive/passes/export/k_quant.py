"""The builder's k_quant on parts of a matrix that fit the caches, on every processor.

onnxruntime's function takes a whole matrix through some twenty arrays of its size, on one processor: for an
embedding of 49,152 x 576 that is more than a gigabyte. Its arithmetic never crosses a block, so parts give
the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_BLOCKS = 4096  # blocks of a part: half a megabyte of float32 at 32 weights a block

Quantise = Callable[..., tuple[Any, Any, Any]]


def in_parts(plain: Quantise, workers: int, blocks: int = _BLOCKS) -> Quantise:
    """``plain`` on ``blocks`` blocks at a time.

    Args:
        plain: ``(data, num_bits, group_size)`` to quantised weights (blocks, group size), scales and zero
            points (blocks, 1).
        workers: threads; numpy lets go of the interpreter in its loops.
        blocks: of a part.

    Returns:
        The same function; quantised weights are uint8, as what follows makes them anyway.
    """

    def quantise(data: Any, num_bits: int = 4, group_size: int = 32) -> tuple[Any, Any, Any]:
        import numpy as np

        rows = np.reshape(data, (-1, group_size))
        weights = np.empty(rows.shape, np.uint8)
        scales, zeros = np.empty((len(rows), 1), np.float64), np.empty((len(rows), 1), np.uint8)

        def one(start: int) -> None:
            place = slice(start, start + blocks)
            with np.errstate(divide="ignore", invalid="ignore"):
                weights[place], scales[place], zeros[place] = plain(rows[place], num_bits, group_size)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, range(0, len(rows), blocks)))
        return weights, scales, zeros

    return quantise


@contextmanager
def k_quant_in_parts() -> Iterator[None]:
    """Let onnxruntime's quantiser work in parts."""
    from onnxruntime.quantization.neural_compressor import weight_only

    plain = weight_only.quant_tensor_k_quant_cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    weight_only.quant_tensor_k_quant_cpu = in_parts(plain, cores)
    try:
        yield
    finally:
        weight_only.quant_tensor_k_quant_cpu = plain
