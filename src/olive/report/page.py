"""report.html: one self-contained page, drawn from the result by a template with autoescape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olive.engine.result import RunResult
from olive.models.artifact import Kind
from olive.report import card, chart, figures

_ORDER = {"error": 0, "warning": 1, "note": 2}
_MACHINE = {
    "cpu": "processor",
    "cores": "cores",
    "memory": "memory",
    "execution_providers": "execution providers",
    "system": "system",
    "python": "Python",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One size, its share of the largest in percent, and its figure."""

    label: str
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class StepView:
    """One step as the page shows it."""

    name: str
    type: str
    took: str
    share: float
    memory: str
    size: str
    cached: bool
    key: str
    facts: list[tuple[str, str]]
    layers: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class GateView:
    """One gate as the page shows it."""

    gate: str
    step: str
    passed: bool
    figures: list[figures.Figure]
    text: str


def render(result: RunResult) -> str:
    """The page; ``result`` is redacted already."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(view(result))


def view(result: RunResult) -> dict[str, Any]:
    """Everything the template shows, as text and figures."""
    loss, evaluated = figures.loss_series(result)
    spent = figures.effort(result)
    return {
        "title": figures.headline(result),
        "changes": figures.changes(result),
        "table": figures.table(result),
        "chart": chart.chart([("training loss", loss), ("evaluation loss", evaluated)]),
        "loss": loss,
        "evaluated": evaluated,
        "sizes": sizes(result),
        "gates": gates(result),
        "steps": steps(result),
        "layer_columns": figures.LAYER_COLUMNS,
        "findings": sorted(result.findings, key=lambda item: _ORDER.get(item.severity, 3)),
        "machine": machine(result),
        "versions": sorted(result.versions.items()),
        "document": json.dumps(result.document, indent=2, ensure_ascii=False),
        "sample": result.sample,
        "load": card.load_code(result),
        "generate": card.generate_code(result),
        "chat": card.chat_command(result) if card.generate_code(result) else None,
        "started": result.started.replace("T", " ").split(".")[0].removesuffix("+00:00").removesuffix("Z"),
        "took": figures.duration(result.seconds),
        "cpu": figures.duration(result.cpu_seconds),
        "effort": figures.duration(spent.took) if spent.earlier else "",
        "memory": figures.size(spent.memory),
        "tool": result.tool,
    }


def sizes(result: RunResult) -> list[Bar]:
    """Size of the input and of each step's model."""
    found = [("input", result.input_size, figures.size(result.input_size))]
    found += [(step.name, step.size, figures.step_size(step)) for step in result.steps]
    largest = max(count for _, count, _ in found) or 1
    return [Bar(name, max(0.4, round(100 * count / largest, 1)), text) for name, count, text in found]


def steps(result: RunResult) -> list[StepView]:
    """The steps, their times as shares of the longest."""
    longest = max((step.seconds for step in result.steps), default=0.0) or 1.0
    return [
        StepView(
            name=step.name,
            type=step.type,
            took=figures.duration(step.seconds),
            share=max(0.4, round(100 * step.seconds / longest, 1)),
            memory=figures.size(step.peak_memory) if step.peak_memory else "",
            size=figures.step_size(step) + (" on its base" if step.kind is Kind.ADAPTER else ""),
            cached=step.cached,
            key=step.key[:12],
            facts=figures.facts(step),
            layers=figures.layers(step),
        )
        for step in result.steps
    ]


def gates(result: RunResult) -> list[GateView]:
    """Every gate of the run in order."""
    return [
        GateView(gate.gate, step.name, gate.passed, figures.gate_figures(gate), gate.text)
        for step in result.steps
        for gate in step.gates
    ]


def machine(result: RunResult) -> list[tuple[str, str]]:
    """What of the hardware the page names."""
    found = []
    for name, label in _MACHINE.items():
        value = result.machine.get(name)
        if name == "memory" and isinstance(value, (int, float)):
            value = figures.size(value)
        if isinstance(value, (list, tuple)):
            value = ", ".join(str(item) for item in value)
        if value not in (None, ""):
            found.append((label, str(value)))
    gpus = [gpu for gpu in result.machine.get("gpus", []) if isinstance(gpu, dict)]
    found += [("accelerator", f"{gpu.get('name')}, {figures.size(gpu.get('memory') or 0)}") for gpu in gpus]
    return found
