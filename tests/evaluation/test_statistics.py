from __future__ import annotations

import random
from statistics import fmean

import pytest

from olive.evaluation.statistics import (
    half_width_of_mean,
    half_width_of_ratio,
    half_width_of_share,
    percentile,
)


def test_wilson_interval_has_its_published_width() -> None:
    # Wilson's 95 % interval of 15 in 20 is 0.531 to 0.888 (Brown, Cai and DasGupta, 2001, give the formula).
    assert half_width_of_share(0.75, 20) == pytest.approx((0.8881 - 0.5313) / 2, abs=1e-4)
    assert half_width_of_share(1.0, 10) == pytest.approx(0.2775 / 2, abs=1e-4)
    assert half_width_of_share(0.0, 0) is None


def test_the_mean_uses_students_t() -> None:
    assert half_width_of_mean([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.7764 * 1.5811 / 5**0.5, rel=1e-3)
    many = [float(value) for value in range(31)]
    assert half_width_of_mean(many) == pytest.approx(2.0423 * 9.0921 / 31**0.5, rel=2e-3)
    assert half_width_of_mean([1.0]) is None


def test_the_ratio_covers_the_truth_as_often_as_it_says() -> None:
    draw = random.Random(0)
    hits = 0
    for _ in range(400):
        counts = [draw.randrange(1, 30) for _ in range(60)]
        sums = [sum(draw.gauss(2.0, 1.0) for _ in range(count)) for count in counts]
        half = half_width_of_ratio(sums, counts)
        assert half is not None
        hits += abs(sum(sums) / sum(counts) - 2.0) < half
    assert 0.91 < hits / 400 < 0.98
    assert half_width_of_ratio([1.0], [1]) is None


def test_percentiles_are_linear_between_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 50) == fmean([2.0, 3.0])
    assert percentile(values, 0) == 1.0
    assert percentile(values, 100) == 4.0
    assert percentile(values, 90) == pytest.approx(3.7)
    assert percentile([5.0], 99) == 5.0
