"""Triton kernels, called fast. Imported only where a GPU is: Triton comes with torch's CUDA builds."""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver


class Kernel:
    """A Triton kernel that is called without Triton's search for its compiled form, which takes 0.1 ms.

    Args:
        kernel: the function; every argument is given by position, constants last.
        options: of its compilation.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options
        self.direct = True
        self.made: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(self, grid: tuple[int, int], *args: Any) -> None:
        """Run it; ``grid`` is the number of programs in both directions."""
        device = args[0].device.index
        # what Triton compiles for: dtypes, alignment, and numbers, of which there are few
        key = (device, *[(x.dtype, x.data_ptr() % 16) if isinstance(x, torch.Tensor) else x for x in args])
        made = self.made.get(key)
        if made is None:
            compiled = self.kernel[(*grid, 1)](*args, **self.options)
            if self.direct:
                self.made[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return
        run, function, metadata = made
        stream = driver.active.get_current_stream(device)
        try:
            run(*grid, 1, stream, function, metadata, None, None, None, *args)
        except TypeError:  # another version of Triton hands its launcher other things
            self.direct = False
            self.made.clear()
            self(grid, *args)
