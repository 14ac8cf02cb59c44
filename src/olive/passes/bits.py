"""Which integers a step will give how many layers, as a plan tells it from tensor headers."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from olive.config.base import Frozen
from olive.models.quantised import Layer


class Setting(Frozen):
    """Layers that are stored in one way.

    Attributes:
        bits: of a weight.
        group_size: weights that share a scale; -1 for a whole row.
        symmetric: no zero points.
        layers: how many.
        bytes: of all their tensors.
    """

    bits: int
    group_size: int
    symmetric: bool
    layers: int
    bytes: int


class PlannedBits(Frozen):
    """What a step will make of the layers' bits.

    Attributes:
        settings: of most layers first; empty where the run has to measure them.
        layers: how many get integers.
        options: settings that each layer is measured at; 0 where they are known.
        bytes: of all tensors that come out; of a step that only chooses, of the matrices it chooses for.
            None where it cannot be told.
        at_most: ``bytes`` is a budget.
        about: what comes out of an earlier step may be wider or narrower than ``bytes`` takes for granted.
        chooses: the step leaves the quantising to the next one.
        choice: layer -> its way, for that one; empty where the run has to measure it.
    """

    settings: tuple[Setting, ...] = ()
    layers: int
    options: int = 0
    bytes: int | None
    at_most: bool = False
    about: bool = False
    chooses: bool = False
    choice: dict[str, Layer] = Field({}, exclude=True)


def counted(choice: Mapping[str, Layer], sizes: Mapping[str, int]) -> tuple[Setting, ...]:
    """The settings of a choice, those of most layers first.

    Args:
        choice: layer -> how it is stored.
        sizes: layer -> bytes of its tensors.
    """
    found: dict[Layer, list[str]] = {}
    for name, layer in choice.items():
        found.setdefault(layer, []).append(name)
    made = [
        Setting(
            bits=layer.bits,
            group_size=layer.group_size,
            symmetric=layer.symmetric,
            layers=len(names),
            bytes=sum(sizes[name] for name in names),
        )
        for layer, names in found.items()
    ]
    return tuple(sorted(made, key=lambda one: (-one.layers, one.bits, one.group_size)))
