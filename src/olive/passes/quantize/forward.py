"""One decoder layer run on one batch, and what its linear layers read. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from olive.quantization.hessian import Moments, add_product

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside the hidden states."""


class Stop(Exception):
    """The forward pass has come as far as it is needed."""


class Group:
    """Linear layers that read one input.

    Attributes:
        names: of the linear layers.
        moments: of their input, as the layers before it make it now.
        drift: sum of (input of the unchanged model - input now) x (input now)^T, float32 (width, width); None
            where the unchanged model does not run beside.
        drift_tokens: how many were added to it.
        solved: what a method keeps for the layers of the group that come after the first.
        closed: no other layer will turn out to read the same input.
        waiting: how many of its layers are not quantised yet; 0 where that is not known.
    """

    def __init__(self, width: int, device: torch.device, paired: bool) -> None:
        self.names: list[str] = []
        self.solved: Any = None
        self.closed, self.waiting = False, 0
        self.moments = Moments(width, device)
        self.drift = torch.zeros(width, width, device=device) if paired else None
        self.drift_tokens = 0

    def add(self, now: torch.Tensor, before: torch.Tensor | None) -> None:
        """Add inputs (tokens, width)."""
        self.moments.add(now)
        if self.drift is not None and before is not None:
            add_product(self.drift, before - now, now)
            self.drift_tokens += len(now)


Quantise = Callable[[Group, Mapping[str, nn.Linear]], None]


class Probe:
    """Quantises the linear layers of one forward pass, each when it is reached.

    Args:
        todo: linear layers by name; each leaves when it is quantised.
        inputs: what each reads in the unchanged layer; None where that does not run.
        real: which tokens are no padding; None where all are.
        quantise: the method.
    """

    def __init__(
        self,
        todo: dict[str, nn.Linear],
        inputs: Mapping[str, torch.Tensor] | None,
        real: torch.Tensor | None,
        quantise: Quantise,
    ) -> None:
        self.todo, self.inputs, self.real, self.quantise = todo, inputs, real, quantise
        self.group: Group | None = None
        self.seen: torch.Tensor | None = None

    def enter(self, name: str, value: torch.Tensor) -> None:
        """A linear layer is about to read ``value``."""
        if name not in self.todo:
            return
        if value is not self.seen or self.group is None:
            before = None if self.inputs is None else self.inputs.get(name)
            self.seen, self.group = value, Group(value.shape[-1], value.device, self.inputs is not None)
            self.group.add(tokens(value, self.real), None if before is None else tokens(before, self.real))
        self.group.names.append(name)
        self.quantise(self.group, {name: self.todo.pop(name)})


def tokens(value: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(tokens, width): the tokens that are no padding."""
    return value.reshape(-1, value.shape[-1]) if real is None else value[real]


def run(layer: nn.Module, hidden: torch.Tensor, given: Given) -> torch.Tensor:
    """What the layer makes of hidden states."""
    made = layer(hidden, *given[0], **given[1])
    return made[0] if isinstance(made, tuple) else made


def reach(
    layer: nn.Module, modules: Mapping[str, nn.Module], hidden: torch.Tensor, given: Given, known: list[str]
) -> tuple[list[str], torch.Tensor | None]:
    """Run a layer as far as the first of ``modules``: which of them read the same input, and that input.

    With ``known`` the answer to the first is known, and the pass ends at once.
    """
    names: list[str] = list(known)
    found: list[torch.Tensor] = []

    def enter(name: str, value: torch.Tensor) -> None:
        if found and value is not found[0]:
            raise Stop
        if not found:
            found.append(value)
        if known:
            raise Stop
        names.append(name)

    with hooked(modules, enter), suppress(Stop):
        run(layer, hidden, given)
    return names, found[0] if found else None


def through(
    layer: nn.Module, modules: Mapping[str, nn.Module], hidden: torch.Tensor, given: Given
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run a layer to its end: what each of ``modules`` reads, and what comes out."""
    found: dict[str, torch.Tensor] = {}
    with hooked(modules, found.__setitem__):
        out = run(layer, hidden, given)
    return found, out


@contextmanager
def hooked(modules: Mapping[str, nn.Module], enter: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    """Have ``enter`` called with the name and the input of each module before it runs."""

    def hook(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        enter(name, args[0])

    hooks = [module.register_forward_pre_hook(partial(hook, name=name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
