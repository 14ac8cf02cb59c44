"""Geometry of the loss curve. The page draws it; labels stay HTML so that they keep their size on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Tick:
    """A label on an axis, ``at`` percent from the left or from the top."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Dot:
    """One measured point, in percent of the plot, with the text shown on hover."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: an SVG path in a 100 x 100 box, and its points."""

    name: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over shared axes."""

    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    points: int


def steps_between(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers that cover ``low`` to ``high``, about ``count`` of them, 1, 2 or 5 times 10**n apart."""
    size = max(abs(low), abs(high))
    span = (max(high - low, 1e-9 * size) if high > low else size) if size > 1e-300 else 1.0
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, max(last, first + 1) + 1)]


def chart(curves: Sequence[tuple[str, Sequence[Point]]]) -> Chart | None:
    """Lay out ``curves`` of (step, value); None when there is no point at all."""
    drawn = [(name, sorted(points)) for name, points in curves if points]
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    y_values = steps_between(min(ys), max(ys), 4)
    left, right = (0.0 if min(xs) <= 0.15 * max(xs) else min(xs)), max(xs)
    x_values = [x for x in steps_between(left, right, 5, whole=True) if left <= x <= right]
    bottom, top = y_values[0], y_values[-1]
    width, height = right - left or 1.0, top - bottom

    def place(point: Point) -> Point:
        return round(100 * (point[0] - left) / width, 2), round(100 * (top - point[1]) / height, 2)

    laid_out = []
    for name, points in drawn:
        placed = [place(point) for point in points]
        path = "M" + " L".join(f"{x} {y}" for x, y in placed)
        shown = placed if len(placed) <= 60 else [placed[-1]]
        values = points if len(placed) <= 60 else [points[-1]]
        dots = tuple(
            Dot(x, y, f"step {step:g}: {name} {value:.4g}")
            for (x, y), (step, value) in zip(shown, values, strict=True)
        )
        laid_out.append(Curve(name, path, dots))
    return Chart(
        tuple(laid_out),
        tuple(Tick(place((x, bottom))[0], f"{x:,.0f}") for x in x_values),
        tuple(Tick(place((left, y))[1], f"{y:.6g}") for y in y_values),
        len(xs),
    )
