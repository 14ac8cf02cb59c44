"""Throughput of one sequence, as a person at the device sees it."""

from __future__ import annotations

from statistics import fmean

from olive.config.workflow import Metric
from olive.evaluation.session import Measured, Session
from olive.evaluation.statistics import half_width_of_mean


def measure(metric: Metric, session: Session) -> dict[str, Measured]:
    """New tokens a second after the first one, and milliseconds to the first one, prompt included."""
    runs = session.timing(metric).runs
    rates = [(len(run) - 1) / sum(run[1:]) if len(run) > 1 else 1 / run[0] for run in runs]
    first = [1e3 * run[0] for run in runs]
    return {
        "tokens_per_second": Measured(fmean(rates), len(runs), half_width_of_mean(rates)),
        "time_to_first_token": Measured(fmean(first), len(runs), half_width_of_mean(first)),
    }
