"""How many threads an operation of torch takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_an_operation() -> Iterator[int]:
    """Let each operation run on the thread that asks for it; gives how many threads there may be.

    For many operations on little data: threads that wait for each other at every one are slow, above all on a
    machine that does other work too.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
