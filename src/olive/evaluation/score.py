"""A measured number."""

from __future__ import annotations

from olive.config.base import Frozen


class Score(Frozen):
    """One measured number.

    Attributes:
        metric: name of the metric in the document.
        name: which of its numbers (``exact_match``, ``perplexity``, ``avg``, ...).
        value: the number.
        unit: ``""`` for ratios, else ``ms``, ``tokens/s``, ``bytes``, ...
        higher_is_better: direction.
        count: samples measured.
        spread: half-width of the 95 % interval, same unit, where there is one.
        priority: as the document says; -1 is report only.
    """

    metric: str
    name: str
    value: float
    unit: str = ""
    higher_is_better: bool = True
    count: int = 0
    spread: float | None = None
    priority: int = -1
