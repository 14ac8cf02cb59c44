"""Figures as people read them: sizes, times, scores, and the before/after table behind every report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from olive.engine.result import GateResult, RunResult, StepResult
from olive.evaluation.score import Score
from olive.models.artifact import Kind

_AT_LEAST = ("min_", "top1", "top_1", "top-1", "agreement", "cosine", "changed", "consumed")
_GATE_FIGURES = {"kl": "KL", "top1": "top-1 agreement", "kept": "change kept"}


def size(count: float) -> str:
    """Bytes in decimal units, three significant digits."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    if unit == "B" or abs(value) >= 99.95:
        return f"{value:.0f} {unit}"
    return f"{value:.1f} {unit}" if abs(value) >= 9.995 else f"{value:.2f} {unit}"


def duration(seconds: float) -> str:
    """Seconds as ``0.4 s``, ``12 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def number(value: float) -> str:
    """A number with three or four significant digits, small ones in scientific notation."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or (float(value).is_integer() and abs(value) < 1e9):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def score_value(score: Score) -> str:
    """The value of a score with its unit; ratios always carry three decimals."""
    if score.unit == "bytes":
        return size(score.value)
    if not score.unit and abs(score.value) <= 1:
        return f"{score.value:.3f}"
    return f"{number(score.value)} {score.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of the table.

    Attributes:
        text: the figure, or a dash where it was not measured.
        note: spread and count, or an empty string.
        trend: ``better``, ``worse`` or ``same`` against the input; empty without comparison.
    """

    text: str
    note: str = ""
    trend: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One metric over the stages."""

    label: str
    arrow: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The before/after table: a column for the input and for each stage that was measured."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def stages(result: RunResult) -> list[tuple[str, StepResult | None, tuple[Score, ...]]]:
    """Columns of the table: the input, each step with scores, and the last step always."""
    found: list[tuple[str, StepResult | None, tuple[Score, ...]]] = [("input", None, result.input_scores)]
    for position, step in enumerate(result.steps):
        if step.scores or position == len(result.steps) - 1:
            found.append((step.name, step, step.scores))
    return found


def table(result: RunResult) -> Table:
    """The before/after table of a run; the last row is the size on disk."""
    columns = stages(result)
    order: dict[tuple[str, str], Score] = {}
    for _, _, scores in columns:
        for score in scores:
            order.setdefault((score.metric, score.name), score)
    rows = [_row(key, first, [scores for _, _, scores in columns]) for key, first in order.items()]
    sizes = tuple(
        Cell(size(result.input_size)) if step is None else Cell(step_size(step)) for _, step, _ in columns
    )
    measured = any(score.unit == "bytes" for score in order.values())
    if not measured:
        rows.append(Row("size on disk", "↓", sizes))
    return Table(tuple(name for name, _, _ in columns), tuple(rows))


def step_size(step: StepResult) -> str:
    """Size of a step's model; an adapter adds to its base."""
    return f"+{size(step.size)}" if step.kind is Kind.ADAPTER else size(step.size)


def _row(key: tuple[str, str], first: Score, columns: list[tuple[Score, ...]]) -> Row:
    found = [next((s for s in scores if (s.metric, s.name) == key), None) for scores in columns]
    before = found[0]
    cells = tuple(_cell(score, before if position else None) for position, score in enumerate(found))
    return Row(label(first), "↑" if first.higher_is_better else "↓", cells)


def label(score: Score) -> str:
    """Name of a number: the metric's, and which of its numbers it is."""
    alone = score.name == score.metric or score.unit == "bytes"
    return (score.metric if alone else f"{score.metric} {score.name}").replace("_", " ")


def _cell(score: Score | None, before: Score | None) -> Cell:
    if score is None:
        return Cell("–")
    notes = []
    if score.spread is not None:
        notes.append(f"± {score_value(score.model_copy(update={'value': score.spread}))}")
    if score.count > 1:
        notes.append(f"n = {score.count:,}")
    return Cell(score_value(score), ", ".join(notes), trend(score, before))


def trend(score: Score, before: Score | None) -> str:
    """How ``score`` stands against ``before``; inside the spread, or too small to show, it is ``same``."""
    if before is None or not (math.isfinite(score.value) and math.isfinite(before.value)):
        return ""
    margin = max(score.spread or 0.0, before.spread or 0.0, 1e-12)
    if abs(score.value - before.value) <= margin or score_value(score) == score_value(before):
        return "same"
    return "better" if (score.value > before.value) == score.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a gate against its limit."""

    label: str
    value: str
    limit: str


def gate_figures(gate: GateResult) -> list[Figure]:
    """The figures of a gate, those with a limit first; it reads ``at most 1e-06`` or is empty."""
    limits = {
        name.removeprefix("max_").removeprefix("min_"): (name, value) for name, value in gate.limits.items()
    }
    figures = []
    for name, value in gate.figures.items():
        limit = ""
        if name in limits:
            spelt, bound = limits[name]
            at_least = not spelt.startswith("max_") and spelt.startswith(_AT_LEAST)
            limit = f"{'at least' if at_least else 'at most'} {number(bound)}"
        shown = size(value) if name == "bytes" else number(value)
        figures.append(Figure(_GATE_FIGURES.get(name, name.replace("_", " ")), shown, limit))
    return sorted(figures, key=lambda figure: not figure.limit)


def model_name(result: RunResult) -> str:
    """Last part of the input model's path or id."""
    path = str(result.document.get("input_model", {}).get("model_path", "")).replace("\\", "/")
    return PurePosixPath(path).name or "the model"


def params(result: RunResult, step: StepResult) -> dict[str, Any]:
    """Parameters of a step as the document gives them."""
    entry = result.document.get("passes", {}).get(step.name, {})
    return entry if isinstance(entry, dict) else {}


def headline(result: RunResult) -> str:
    """What was done, in one sentence without a full stop."""
    parts = []
    for step in result.steps:
        if step.type == "FullFinetune":
            parts.append("fine-tuned")
        elif "loss" in step.series:
            parts.append(f"fine-tuned with {step.type}")
        elif step.type == "MergeAdapterWeights":
            parts.append("merged")
        elif layers(step):
            parts.append(f"quantised with {step.type}")
        elif "rotations" in step.facts:
            parts.append(f"rotated with {step.type}")
        elif step.type == "ModelBuilder":
            parts.append(f"exported to {params(result, step).get('precision', '')} ONNX".replace("  ", " "))
        else:
            parts.append(f"passed through {step.type}")
    if not parts:
        return f"{model_name(result)} as it came"
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{model_name(result)}, {joined}"


@dataclass(frozen=True, slots=True)
class Change:
    """One metric before and after, for the top of a report."""

    label: str
    before: str
    after: str
    trend: str


def changes(result: RunResult) -> list[Change]:
    """Input against final model: the three metrics that matter most, then the size."""
    final = result.steps[-1].scores if result.steps else ()
    ranked = sorted(final, key=lambda score: score.priority if score.priority >= 0 else 1_000_000)
    first_of_metric = {score.metric: score for score in reversed(ranked) if score.unit != "bytes"}
    found = []
    for score in [score for score in ranked if first_of_metric.get(score.metric) is score][:3]:
        before = next(
            (s for s in result.input_scores if (s.metric, s.name) == (score.metric, score.name)), None
        )
        found.append(
            Change(
                label(score),
                score_value(before) if before else "",
                score_value(score),
                trend(score, before),
            )
        )
    if result.steps and result.steps[-1].kind is not Kind.ADAPTER:
        last = result.steps[-1].size
        direction = "better" if last < result.input_size else "worse" if last > result.input_size else "same"
        found.append(Change("size", size(result.input_size), size(last), direction))
    return found


def loss_series(result: RunResult) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(step, loss) and (step, evaluation loss) of every training step; non-finite values are left out."""
    loss: list[tuple[float, float]] = []
    evaluated: list[tuple[float, float]] = []
    for step in result.steps:
        for points in step.series.values():
            for point in points:
                at = point.get("step")
                if at is None:
                    continue
                for name, into in (("loss", loss), ("eval_loss", evaluated)):
                    value = point.get(name)
                    if value is not None and math.isfinite(value):
                        into.append((at, value))
    return loss, evaluated


def facts(step: StepResult) -> list[tuple[str, str]]:
    """Facts of a step as label and text; nested ones are left to run.json."""
    found = []
    for name, value in step.facts.items():
        if name == "seconds":  # of the whole step, shown beside its name
            continue
        if isinstance(value, bool):
            found.append((name.replace("_", " "), "yes" if value else "no"))
        elif isinstance(value, (int, float)):
            text = size(value) if name.endswith("bytes") else number(float(value))
            found.append((name.replace("_", " "), text))
        elif isinstance(value, str) and value:
            found.append((name.replace("_", " "), value))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
            found.append((name.replace("_", " "), ", ".join(value)))
    return found


LAYER_COLUMNS = ("layer", "bits", "block", "weight error", "output error", "KL", "seconds", "")


def layers(step: StepResult) -> list[tuple[str, ...]]:
    """Of a quantisation the table of its layers, under ``LAYER_COLUMNS``; empty for other steps."""
    rows = step.facts.get("layers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "weight_error" in row for row in rows):
        return []
    kl = {name: value for gate in step.gates if gate.passed for name, value in gate.layers.items()}
    return [
        (
            str(row["name"]),
            str(row["bits"]),
            "row" if row.get("group_size") == -1 else str(row.get("group_size", "")),
            f"{row['weight_error']:.2%}",
            f"{row['output_error']:.2%}" if "output_error" in row else "",
            f"{kl[row['name']]:.2g}" if row["name"] in kl else "",
            f"{row['seconds']:.2f}" if "seconds" in row else "",
            str(row.get("fallback", "")),
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Effort:
    """What the model cost, whichever run paid for it.

    Attributes:
        took: wall time of the run, or of the steps where earlier runs did some of them.
        memory: bytes at the peak.
        earlier: whether some of it was spent in an earlier run.
    """

    took: float
    memory: int
    earlier: bool


def effort(result: RunResult) -> Effort:
    """What the model cost. A run from the cache costs nothing, and its model still did."""
    earlier = any(step.cached for step in result.steps)
    computed = sum(step.seconds for step in result.steps)
    peak = max([result.peak_memory, *(step.peak_memory for step in result.steps)])
    return Effort(max(result.seconds, computed) if earlier else result.seconds, peak, earlier)
