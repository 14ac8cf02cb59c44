"""Hidden states between layers, and the next layer's weights: where a calibration keeps them. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from olive.models.stream import LazyTensors

_ON_DEVICE = 1 << 30  # bytes of hidden states that stay on a GPU


class States:
    """Hidden states, a tensor a batch; more than a GiB of them wait in the host's memory.

    Args:
        device: where they are computed on.
        size: bytes of all of them.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._kept: list[torch.Tensor] = []
        self._away = device.type == "cuda" and size > _ON_DEVICE
        self._device = device
        self._in: torch.cuda.Stream | None = torch.cuda.Stream() if self._away else None
        self._out: torch.cuda.Stream | None = torch.cuda.Stream() if self._away else None

    def append(self, value: torch.Tensor) -> None:
        """Keep one more."""
        if self._away:
            waiting = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._kept.append(waiting)
            self[len(self._kept) - 1] = value
        else:
            self._kept.append(value)

    def __len__(self) -> int:
        return len(self._kept)

    def __setitem__(self, place: int, value: torch.Tensor) -> None:
        if self._out is None:
            self._kept[place] = value
            return
        self._out.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._out):
            self._kept[place].copy_(value, non_blocking=True)
        value.record_stream(self._out)

    def __getitem__(self, place: int) -> torch.Tensor:
        """One of them, on the device."""
        if self._out is not None:
            self._out.synchronize()
        return self._kept[place].to(self._device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """All, on the device; the next one comes while this one is used. One may be replaced meanwhile."""
        if self._in is None or self._out is None:
            yield from self._kept
            return
        self._in.wait_stream(self._out)
        coming = self._fetch(0)
        done: list[torch.cuda.Event] = []
        for place in range(len(self._kept)):
            value, arrived = coming
            if place > 1:  # running further ahead would only hold more memory
                done[place - 2].synchronize()
            if place + 1 < len(self._kept):
                coming = self._fetch(place + 1)
            torch.cuda.current_stream().wait_event(arrived)
            value.record_stream(torch.cuda.current_stream())
            yield value
            done.append(torch.cuda.Event())
            done[-1].record()

    def _fetch(self, place: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        assert self._in is not None  # noqa: S101 - only where states are away
        with torch.cuda.stream(self._in):
            value = self._kept[place].to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return value, arrived

    def copy(self, count: int | None = None) -> States:
        """The same states, or the first ``count``, to be replaced on their own."""
        other = States.__new__(States)
        other._away, other._device, other._in, other._out = self._away, self._device, self._in, self._out
        if self._out is not None:
            self._out.synchronize()
        kept = self._kept[:count]
        other._kept = [one.clone().pin_memory() for one in kept] if self._away else list(kept)
        return other


class Replay:
    """What the attention of a finished part of a layer gives, so that it need not run again in later passes.

    Args:
        device: where it is computed on.
        size: bytes of the results of all batches, for where they wait; see ``States``.
        count: of batches.
    """

    def __init__(self, device: torch.device, size: int, count: int) -> None:
        self._states, self._count = States(device, size), count
        self._module: nn.Module | None = None
        self._next, self._full = 0, False
        self._coming: Iterator[torch.Tensor] | None = None

    def attach(self, module: nn.Module) -> None:
        """Stand before a module of which the results on all batches will not change from now on."""
        plain, self._module = module.forward, module
        self._next, self._full = 0, False

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._coming is not None:
                return next(self._coming), None
            made = plain(*args, **kwargs)
            if isinstance(made, tuple) and len(made) == 2 and made[1] is None:
                self._keep(made[0])
            return made

        module.__dict__["forward"] = forward

    def detach(self) -> None:
        """Give the module its own forward back."""
        if self._module is not None:
            del self._module.__dict__["forward"]
        self._module = self._coming = None

    def rewind(self) -> None:
        """A pass over all batches begins."""
        self._full = self._full or (self._module is not None and self._next == self._count)
        self._coming = iter(self._states) if self._full and self._module is not None else None
        self._next = 0

    def _keep(self, value: torch.Tensor) -> None:
        if self._next < len(self._states):
            self._states[self._next] = value
        else:
            self._states.append(value)
        self._next += 1


class Ahead:
    """A model's tensors, those of the next layer read by another thread while this one is at work.

    Args:
        tensors: of the model.
        device: where they will go; read ahead only for a GPU.
    """

    def __init__(self, tensors: LazyTensors, device: torch.device) -> None:
        self._tensors = tensors
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._coming: dict[str, Future[dict[str, torch.Tensor]]] = {}
        self._held: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        held = self._held.get(name)
        return self._tensors[name] if held is None else held

    def turn(self, now: str, following: str | None) -> None:
        """Hold the tensors below ``now``, drop the others, and begin to read those below ``following``."""
        if self._pool is None:
            return
        self._held = (self._coming.pop(now, None) or self._pool.submit(self._read, now)).result()
        if following is not None:
            self._coming[following] = self._pool.submit(self._read, following)

    def _read(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self._tensors if name.startswith(f"{prefix}.")]
        return {name: self._tensors[name].pin_memory() for name in names}
