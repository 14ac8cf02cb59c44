"""The split grammar of ``datasets``: ``train``, ``train[:10%]``, ``train[100:200]+test``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

S = TypeVar("S", list[Any], range)
_PART = re.compile(
    r"(?P<split>\w+(?:\.\w+)*)"
    r"(?:\[(?:(?P<start>-?\d+)(?P<start_pct>%)?)?:(?:(?P<stop>-?\d+)(?P<stop_pct>%)?)?\])?"
)


@dataclass(frozen=True, slots=True)
class Slice:
    """One term of a split: the rows ``start:stop`` of ``split``, as counts or as percentages."""

    split: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False


def parse_split(text: str) -> tuple[Slice, ...] | None:
    """The terms of a split expression; None when it is not one."""
    found: list[Slice] = []
    for term in text.split("+"):
        match = _PART.fullmatch(term.strip())
        if match is None:
            return None
        start, stop = match["start"], match["stop"]
        percent = bool(match["start_pct"] or match["stop_pct"])
        if percent and any(value is not None and abs(int(value)) > 100 for value in (start, stop)):
            return None
        found.append(
            Slice(
                match["split"],
                None if start is None else int(start),
                None if stop is None else int(stop),
                percent,
            )
        )
    return tuple(found)


def bounds(part: Slice, count: Callable[[], int]) -> tuple[int, int | None]:
    """First row and the one behind the last that a slice selects; ``count`` is asked where it matters."""
    start, stop = part.start, part.stop
    if part.percent or min(start or 0, stop or 0) < 0:
        total = count()
        chosen = take(range(total), part)
        return chosen.start, max(chosen.start, chosen.stop)
    return start or 0, None if stop is None else max(stop, start or 0)


def take(items: S, part: Slice) -> S:
    """The items the slice selects; percentages round to the closest item, as ``datasets`` does."""

    def index(value: int | None) -> int | None:
        if value is None or not part.percent:
            return value
        return round(value * len(items) / 100)

    return items[slice(index(part.start), index(part.stop))]
