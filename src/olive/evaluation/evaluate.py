"""A model and an evaluator in, scores out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path

from olive.config.workflow import Accelerator, DataConfig, Evaluator, Metric, SubMetric
from olive.errors import PassFailed
from olive.evaluation.catalog import NUMBERS
from olive.evaluation.metrics import accuracy, latency, perplexity, size, throughput
from olive.evaluation.score import Score
from olive.evaluation.session import Measured, Session
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact
from olive.passes.base import Progress

_MEASURE: dict[str, Callable[[Metric, Session], dict[str, Measured]]] = {
    "accuracy": accuracy.measure,
    "perplexity": perplexity.measure,
    "latency": latency.measure,
    "throughput": throughput.measure,
    "size_on_disk": size.measure,
}


def evaluate(
    model: Artifact,
    evaluator: Evaluator,
    *,
    data: Mapping[str, DataConfig],
    base_dir: Path,
    machine: Machine,
    accelerator: Accelerator,
    progress: Progress,
) -> tuple[Score, ...]:
    """Measure every metric of ``evaluator`` on ``model``; the model is loaded once, and freed at the end.

    Args:
        model: of kind HF or ADAPTER (PyTorch) or GENAI (ONNX Runtime GenAI).
        evaluator: what to measure; ``check_evaluator`` has passed it.
        data: name -> data config.
        base_dir: folder that relative data paths are looked up in.
        machine: this machine.
        accelerator: device and execution provider; there is no silent fallback.
        progress: where to say how far it is.

    Returns:
        Scores in the order of the document.

    Raises:
        ConfigError: the data does not fit the metric or the model.
        PassFailed: a number is not finite.
        EnvironmentFault: the execution provider is not there.
    """
    session = Session(
        model, data=data, base_dir=base_dir, machine=machine, accelerator=accelerator, progress=progress
    )
    try:
        return tuple(score for metric in evaluator.metrics for score in _measure(metric, session))
    finally:
        session.close()


def _measure(metric: Metric, session: Session) -> list[Score]:
    numbers = NUMBERS[metric.type]
    measured = _MEASURE[metric.type](metric, session)
    scores: list[Score] = []
    for sub in metric.sub_types or tuple(SubMetric(name=name) for name in numbers):
        found = measured[sub.name]
        if not isfinite(found.value):
            raise PassFailed(
                f"metric {metric.name!r}: {sub.name} is {found.value}",
                fix="The model's output is no number; check the step that made it.",
            )
        scores.append(
            Score(
                metric=metric.name,
                name=sub.name,
                value=found.value,
                unit=numbers[sub.name].unit,
                higher_is_better=numbers[sub.name].higher_is_better,
                count=found.count,
                spread=found.spread,
                priority=sub.priority,
            )
        )
    return scores
