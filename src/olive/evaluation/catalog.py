"""Which numbers each metric has, their unit and direction."""

from __future__ import annotations

from olive.config.base import Frozen


class Number(Frozen):
    """One number a metric can report.

    Attributes:
        unit: as in ``Score``.
        higher_is_better: direction.
    """

    unit: str = ""
    higher_is_better: bool = True


_MS = Number(unit="ms", higher_is_better=False)

NUMBERS: dict[str, dict[str, Number]] = {
    "accuracy": {"accuracy_score": Number(), "f1_score": Number(), "exact_match": Number()},
    "perplexity": {"perplexity": Number(higher_is_better=False)},
    "latency": {name: _MS for name in ("avg", "min", "max", "p50", "p90", "p99", "first_token", "per_token")},
    "throughput": {"tokens_per_second": Number(unit="tokens/s"), "time_to_first_token": _MS},
    "size_on_disk": {"bytes": Number(unit="bytes", higher_is_better=False)},
}
NEEDS_DATA = ("accuracy", "perplexity")
