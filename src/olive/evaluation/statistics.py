"""How sure a measured number is: half-widths of 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import stdev

_Z = 1.959964
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def half_width_of_share(share: float, count: int) -> float | None:
    """Half-width of Wilson's score interval of a share seen in ``count`` samples (Wilson, 1927)."""
    if count < 1:
        return None
    z2 = _Z * _Z / count
    return _Z * sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)


def half_width_of_mean(values: Sequence[float]) -> float | None:
    """Half-width of the mean of independent values, by Student's t; None for fewer than two."""
    freedom = len(values) - 1
    if freedom < 1:
        return None
    # Beyond the table: Cornish-Fisher's first term, within 0.1 % of the quantile from 16 degrees on.
    quantile = _T[freedom - 1] if freedom <= len(_T) else _Z + (_Z**3 + _Z) / (4 * freedom)
    return quantile * stdev(values) / sqrt(len(values))


def half_width_of_ratio(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Half-width of sum(sums)/sum(counts), documents drawn independently (linearised ratio estimator)."""
    documents = len(sums)
    if documents < 2:
        return None
    total = sum(counts)
    ratio = sum(sums) / total
    residual = sum((value - ratio * count) ** 2 for value, count in zip(sums, counts, strict=True))
    return _Z * sqrt(residual * documents / (documents - 1)) / total


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of ``values``, linear between neighbours (type 7 of Hyndman and Fan, 1996)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
