"""Latency of one answer: a prompt of ``prompt_tokens`` in, ``new_tokens`` out, one sequence at a time."""

from __future__ import annotations

from statistics import fmean

from olive.config.workflow import Metric
from olive.evaluation.session import Measured, Session
from olive.evaluation.statistics import half_width_of_mean, percentile


def measure(metric: Metric, session: Session) -> dict[str, Measured]:
    """Milliseconds: of whole answers (``avg`` to ``p99``), to the first token, and for each one after it.

    Runs before the counted ones warm the caches. ``per_token`` is 0 when only one token is generated.
    """
    runs = [[1e3 * second for second in run] for run in session.timing(metric).runs]
    whole = [sum(run) for run in runs]
    first = [run[0] for run in runs]
    later = [fmean(run[1:]) if len(run) > 1 else 0.0 for run in runs]
    count = len(runs)
    return {
        "avg": Measured(fmean(whole), count, half_width_of_mean(whole)),
        "min": Measured(min(whole), count),
        "max": Measured(max(whole), count),
        "p50": Measured(percentile(whole, 50), count),
        "p90": Measured(percentile(whole, 90), count),
        "p99": Measured(percentile(whole, 99), count),
        "first_token": Measured(fmean(first), count, half_width_of_mean(first)),
        "per_token": Measured(fmean(later), count, half_width_of_mean(later)),
    }
