"""The curve of a training, and when it says to stop: the evaluation loss has not fallen for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olive.errors import Problem, Severity

PATIENCE, THRESHOLD = "early_stopping_patience", "early_stopping_threshold"
_LOSS = ("loss", "eval_loss")


@dataclass(frozen=True, slots=True)
class Patience:
    """When to stop.

    Attributes:
        evaluations: how many in a row may pass without a gain.
        threshold: what the loss must fall by to count as a gain.
    """

    evaluations: int
    threshold: float = 0.0

    @classmethod
    def of(cls, training_args: Mapping[str, Any]) -> Patience | None:
        """What ``training_args`` ask for; None where they ask for nothing."""
        given = training_args.get(PATIENCE)
        return None if given is None else cls(int(given), float(training_args.get(THRESHOLD) or 0.0))

    def over(self, curve: Iterable[Mapping[str, float]]) -> bool:
        """Whether training is to stop.

        What the curve says is all there is to know, so that a resumed run counts on where it was.

        Args:
            curve: points of the training so far; those with an ``eval_loss`` count, but for one before the
                first step.
        """
        best, waited = float("inf"), 0
        for point in curve:
            if point["step"] == 0 or "eval_loss" not in point:
                continue
            loss = point["eval_loss"]
            waited = 0 if best - loss > self.threshold else waited + 1
            best = min(best, loss)
        return waited >= self.evaluations


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


def best_point(curve: Sequence[Mapping[str, float]]) -> Mapping[str, float] | None:
    """The first point with the lowest evaluation loss; None without evaluations."""
    evaluated = [point for point in curve if "eval_loss" in point and point["step"] > 0]
    return min(evaluated, key=lambda point: point["eval_loss"], default=None)


def check(args: Mapping[str, Any], has_eval: bool) -> Iterator[Problem]:
    """What of the settings does not go together, before anything runs.

    Args:
        args: ``training_args``.
        has_eval: whether there are evaluation rows.
    """
    metric = args.get("metric_for_best_model")
    if metric is not None and metric not in _LOSS:
        yield Problem(
            f"metric_for_best_model {metric!r} is not measured in training; eval_loss is",
            "training_args",
            "Remove it, and compare other metrics with an evaluator on each pass.",
        )
    if args.get(PATIENCE) is None:
        if args.get(THRESHOLD) is not None:
            yield Problem(
                f"{THRESHOLD} without {PATIENCE} stops nothing", "training_args", f"Set {PATIENCE}."
            )
        return
    if args.get("greater_is_better"):
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
