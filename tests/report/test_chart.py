"""Geometry of the loss curve."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from olive.report.chart import chart, steps_between

finite = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


def test_corners() -> None:
    drawn = chart([("loss", [(0, 4.0), (10, 0.0)])])
    assert drawn is not None
    assert drawn.curves[0].path == "M0.0 0.0 L100.0 100.0"
    assert [tick.text for tick in drawn.y_ticks] == ["0", "1", "2", "3", "4"]
    assert [(tick.at, tick.text) for tick in drawn.x_ticks][::5] == [(0.0, "0"), (100.0, "10")]


def test_empty_and_single() -> None:
    assert chart([("loss", [])]) is None
    single = chart([("loss", [(10, 2.5)])])
    assert single is not None
    assert len(single.curves[0].dots) == 1


def test_round_steps() -> None:
    assert steps_between(0.3, 3.2, 4) == [0, 1, 2, 3, 4]
    assert steps_between(0, 3, 5, whole=True) == [0, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(1, 100_000), finite), min_size=1, max_size=50))
def test_every_point_lies_in_the_plot(points: list[tuple[float, float]]) -> None:
    drawn = chart([("loss", points)])
    assert drawn is not None
    for dot in drawn.curves[0].dots:
        assert -0.01 <= dot.x <= 100.01
        assert -0.01 <= dot.y <= 100.01
    assert all(
        math.isfinite(tick.at) and -0.01 <= tick.at <= 100.01 for tick in (*drawn.x_ticks, *drawn.y_ticks)
    )
    assert 1 <= len(drawn.y_ticks) <= 12


def test_a_long_curve_keeps_its_points_and_drops_its_dots() -> None:
    drawn = chart([("loss", [(step, 1 / step) for step in range(1, 2001)])])
    assert drawn is not None
    assert drawn.curves[0].path.count("L") == 1999
    assert len(drawn.curves[0].dots) == 1
