"""The curve of a training, and when it says to stop: evaluations have not become better for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olive.errors import Problem, Severity

PATIENCE, THRESHOLD = "early_stopping_patience", "early_stopping_threshold"


@dataclass(frozen=True, slots=True)
class Patience:
    """When to stop.

    Attributes:
        evaluations: how many in a row may pass without a gain.
        threshold: what the metric must be better by to count as a gain.
        metric: name of what is looked at, in the curve.
        greater: whether more of it is better.
    """

    evaluations: int
    threshold: float = 0.0
    metric: str = "eval_loss"
    greater: bool = False

    @classmethod
    def of(cls, training_args: Mapping[str, Any]) -> Patience | None:
        """What ``training_args`` ask for; None where they ask for nothing."""
        given = training_args.get(PATIENCE)
        if given is None:
            return None
        metric, greater = watched(training_args)
        return cls(int(given), float(training_args.get(THRESHOLD) or 0.0), metric, greater)

    def over(self, curve: Iterable[Mapping[str, float]]) -> bool:
        """Whether training is to stop.

        What the curve says is all there is to know, so that a resumed run counts on where it was.

        Args:
            curve: points of the training so far; those with the metric count, but for one before the first
                step.
        """
        best, waited = float("inf"), 0
        for point in curve:
            if point["step"] == 0 or self.metric not in point:
                continue
            value = -point[self.metric] if self.greater else point[self.metric]
            waited = 0 if best - value > self.threshold else waited + 1
            best = min(best, value)
        return waited >= self.evaluations


def watched(training_args: Mapping[str, Any]) -> tuple[str, bool]:
    """The metric that tells the best state, by its name in the curve, and whether more of it is better."""
    metric = str(training_args.get("metric_for_best_model") or "eval_loss")
    greater = training_args.get("greater_is_better")
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    return name, not name.endswith("loss") if greater is None else bool(greater)


@dataclass(slots=True)
class Curve:
    """What a training run reports; survives a kill with the checkpoint.

    Attributes:
        points: one a step, and evaluation losses.
        tokens, seconds: of training.
        patience: what ends training early.
    """

    points: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    patience: Patience | None = None

    @property
    def stopped(self) -> bool:
        """Whether training is to end early."""
        return self.patience is not None and self.patience.over(self.points)


def best_point(
    curve: Sequence[Mapping[str, float]], metric: str = "eval_loss", greater: bool = False
) -> Mapping[str, float] | None:
    """The first point with the best of a metric; None without evaluations."""
    evaluated = [point for point in curve if metric in point and point["step"] > 0]
    return min(evaluated, key=lambda point: -point[metric] if greater else point[metric], default=None)


def check(args: Mapping[str, Any], has_eval: bool, metrics: Sequence[str] = ("loss",)) -> Iterator[Problem]:
    """What of the settings does not go together, before anything runs.

    Args:
        args: ``training_args``.
        has_eval: whether there are evaluation rows.
        metrics: what evaluations in training measure.
    """
    metric, greater = watched(args)
    if metric.removeprefix("eval_") not in metrics:
        yield Problem(
            f"metric_for_best_model {args['metric_for_best_model']!r} is not measured in training; "
            f"{', '.join(metrics)} is",
            "training_args",
            "Remove it, and compare other metrics with an evaluator on each pass.",
        )
    if args.get(PATIENCE) is None:
        if args.get(THRESHOLD) is not None:
            yield Problem(
                f"{THRESHOLD} without {PATIENCE} stops nothing", "training_args", f"Set {PATIENCE}."
            )
        return
    if greater and metric.endswith("loss"):
        yield Problem(
            "greater_is_better is true, and early stopping looks at a loss", "training_args", "Remove it."
        )
    if not has_eval:
        yield Problem(
            f"{PATIENCE} needs evaluation rows, and there are none",
            "training_args",
            "Set eval_dataset_size, for example 0.1, or eval_data_config.",
        )
    if args.get("eval_strategy", "steps" if args.get("eval_steps") else "no") == "no":
        yield Problem(
            f"{PATIENCE} counts evaluations, and none is asked for",
            "training_args",
            "Set eval_strategy to epoch, or to steps with eval_steps.",
        )
    if args.get("load_best_model_at_end") is False:
        yield Problem(
            "load_best_model_at_end is false: the last state is saved, not the best",
            "training_args",
            "Remove it.",
            Severity.WARNING,
        )
