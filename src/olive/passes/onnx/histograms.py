"""Where to cut off activations: by percentile, or where the integers lose least information."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BINS = 2048  # of magnitudes
_LEVELS, _STEP = 128, 8
_LITTLE = 1e-4  # of a count, in place of none


class Histogram:
    """Counts of the magnitudes of a tensor.

    Args:
        largest: magnitude, of all that will come.
    """

    def __init__(self, largest: float) -> None:
        import numpy as np

        self.largest = largest
        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count finite values."""
        import numpy as np

        if self.largest > 0 and values.size:
            sizes = np.abs(values.reshape(-1).astype(np.float32, copy=False))
            self.counts += np.histogram(sizes, BINS, (0.0, self.largest))[0]

    def percentile(self, percent: float) -> float:
        """The smallest edge of a bin below which ``percent`` of the magnitudes are."""
        import numpy as np

        total = int(self.counts.sum())
        if not total:
            return self.largest
        wanted = np.ceil(percent / 100 * total - 1e-6)
        place = int(np.searchsorted(np.cumsum(self.counts), wanted))
        return (min(place, BINS - 1) + 1) / BINS * self.largest

    def entropy(self) -> float:
        """The edge where 128 levels lose least information (Migacz 2017, 8-bit inference with TensorRT).

        For each cut, the distribution with all beyond it in the last bin is compared with the same one in 128
        levels, by Kullback-Leibler divergence. Exact zeros, which integers hold, are left out.
        """
        import numpy as np

        counts = self.counts.astype(np.float64)
        counts[0] = counts[1]
        if not counts.any():
            return self.largest
        best, cut = np.inf, BINS
        for width in range(_LEVELS, BINS + 1, _STEP):
            wanted = counts[:width].copy()
            wanted[-1] += counts[width:].sum()
            got = _in_levels(counts[:width])
            got[-1] = max(got[-1], _LITTLE)  # what is cut off is in an empty bin
            here = wanted > 0
            first, second = wanted / wanted.sum(), got / got.sum()
            lost = float((first[here] * np.log(first[here] / second[here])).sum())
            if lost < best:
                best, cut = lost, width
        return cut / BINS * self.largest


def _in_levels(counts: np.ndarray) -> np.ndarray:
    """Counts in 128 levels, each spread evenly over its bins that are not empty."""
    import numpy as np

    edges = (np.arange(_LEVELS) * len(counts)) // _LEVELS
    sums = np.add.reduceat(counts, edges)
    filled = np.add.reduceat((counts > 0).astype(np.float64), edges)
    each = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    lengths = np.diff(np.append(edges, len(counts)))
    spread: np.ndarray = np.repeat(each, lengths) * (counts > 0)
    return spread
