"""What the terminal says: plain text in 80 columns, so that it survives a paste into a chat."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olive.errors import Problem, Severity
from olive.models.artifact import Kind, ModelInfo
from olive.report import figures, redact

if TYPE_CHECKING:
    from olive.data.plan import Preview
    from olive.engine.plan import Plan, PlannedStep
    from olive.engine.result import RunResult
    from olive.passes.bits import PlannedBits

WIDTH = 80


def columns(rows: Sequence[Sequence[str]], indent: str = "  ", gap: str = "   ") -> list[str]:
    """Rows as aligned text: the first column left, the others right."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        lines.append((indent + gap.join(cells)).rstrip())
    return lines


def labelled(label: str, text: str) -> list[str]:
    """``label`` in a column of its own, ``text`` wrapped beside it."""
    return _wrapped(text, f"  {label:<9} ", " " * 12)


def summary(result: RunResult, shown_as: str | None = None) -> str:
    """The run in a dozen lines.

    Args:
        result: the run.
        shown_as: the output folder as the user wrote it.
    """
    result = redact.result(result)
    lines = [*textwrap.wrap(f"{figures.headline(result)}.", WIDTH), ""]
    table = figures.table(result)
    rows = [["", *table.columns]]
    rows += [[f"{row.label} {row.arrow}", *(cell.text for cell in row.cells)] for row in table.rows]
    lines += [*columns(rows), ""]
    cached = bool(result.steps) and all(step.cached for step in result.steps)
    steps = (
        "all from the cache"
        if cached
        else ", ".join(_step(s.name, s.seconds, s.cached) for s in result.steps)
    )
    lines += labelled("steps", steps)
    gates = [
        f"{gate.gate} {'passed' if gate.passed else 'FAILED'}{_figures(figures.gate_figures(gate))}"
        for step in result.steps
        for gate in step.gates
    ]
    if gates:
        lines += labelled("gates", "; ".join(gates))
    took = f"{figures.duration(result.seconds)}, peak memory {figures.size(result.peak_memory)}"
    lines += labelled("took", took)
    where = shown_as or relative(Path(result.output_dir))
    lines += labelled("result", f"{where}: model/, report.html, README.md, run.json")
    if result.steps and result.steps[-1].kind is Kind.GENAI:
        lines += labelled("try it", f"olive chat {where}")
    return "\n".join(lines)


def _step(name: str, seconds: float, cached: bool) -> str:
    return f"{name} {'from the cache' if cached else figures.duration(seconds)}"


def _figures(shown: Iterable[figures.Figure]) -> str:
    limited = [f"{item.label} {item.value}, {item.limit}" for item in shown if item.limit]
    return f" ({', '.join(limited)})" if limited else ""


def relative(path: Path) -> str:
    """``path`` as seen from here when that is shorter, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def problems(found: Iterable[Problem], indent: str = "") -> str:
    """Findings as text, errors first, then warnings, then notes; a note is one paragraph."""
    order = list(Severity)
    lines = []
    for problem in sorted(found, key=lambda item: order.index(item.severity)):
        where = redact.text(problem.where or "")
        message, fix = redact.text(problem.message), redact.text(problem.fix or "")
        if problem.severity is Severity.NOTE:
            # The message names the setting: file and line are enough to find it.
            place = f" [{where.partition(': $')[0]}]" if where else ""
            message, where, fix = f"{message}{place}{'; ' if fix else ''}{fix}", "", ""
        lines += _wrapped(message, f"{indent}{problem.severity.value}: ", f"{indent}  ")
        if where:
            lines.append(f"{indent}  at  {where}")
        if fix:
            lines += _wrapped(fix, f"{indent}  fix ", f"{indent}      ")
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        lines += textwrap.wrap(
            paragraph,
            WIDTH,
            initial_indent=rest if lines else first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def plan_view(plan: Plan) -> str:
    """The plan as text."""
    lines = [f"Plan of {plan.loaded.path.name if plan.loaded.path else 'the workflow'}", ""]
    if plan.info is not None:
        model = (
            f"{_form(plan.info)}, {_count(plan.info.parameters)} parameters, {relative(_place(plan.info))}"
        )
        lines += labelled("model", model)
    machine = plan.machine
    memory = f"{figures.size(machine.memory)} memory, {figures.size(machine.memory_available)} available"
    lines += labelled("machine", f"{machine.cores} cores of {machine.cpu}, {memory}")
    for gpu in machine.gpus:
        lines += labelled("", f"{gpu.name}, {figures.size(gpu.memory)}")
    lines += labelled(
        "cache", f"{relative(plan.store_root)}, {figures.size(plan.disk_free)} free on its disk"
    )
    lines += labelled("output", relative(plan.output_dir))
    lines += ["", "Steps", *columns([_STEP_HEAD, *(_planned(step) for step in plan.steps)], gap="  ")]
    for step in plan.steps:
        given = plan.document.get("passes", {}).get(step.name, {})
        chosen = {name: value for name, value in given.items() if name not in ("type", "host", "evaluator")}
        if chosen:
            lines += ["", f"Settings of {step.name}", *labelled("", _params(chosen))]
        if step.bits is not None:
            lines += ["", f"Bits of {step.name}", *_bits(step.bits)]
    for name, shown in plan.previews.items():
        lines += ["", f"Data {name}", *_preview(shown)]
    if plan.findings:
        lines += ["", problems(plan.findings)]
    errors = sum(problem.severity is Severity.ERROR for problem in plan.findings)
    if errors:
        lines += ["", f"Not ready: {errors} error{'s' if errors > 1 else ''} above."]
    else:
        lines += ["", f"Ready: {len(plan.to_run)} of {len(plan.steps)} steps to run."]
    return redact.text("\n".join(lines))


_STEP_HEAD = ["", "does", "on", "memory", "disk", "time", ""]


def _planned(step: PlannedStep) -> list[str]:
    cost = step.cost
    state = "cached" if step.cached else "to run"
    return [
        step.name,
        step.type,
        f"{step.accelerator.device} {step.dtype}".rstrip()
        + (f" x {step.processes} {step.strategy}" if step.processes > 1 else ""),
        figures.size(cost.memory) if cost.memory else "–",
        figures.size(cost.disk) if cost.disk else "–",
        f"~{figures.duration(cost.seconds)}" if cost.seconds else "–",
        state,
    ]


def _bits(planned: PlannedBits) -> list[str]:
    """How many layers get how many bits, and the bytes of what comes out."""
    ways = [
        f"{one.layers} at {one.bits} bits, {_block(one.group_size)}{', symmetric' if one.symmetric else ''}, "
        f"{figures.size(one.bytes)}"
        for one in planned.settings
    ]
    if not ways:
        how = (
            f"at one of {planned.options} settings that are measured first"
            if planned.chooses
            else "as the step before it chooses"
        )
        ways = [f"{planned.layers}, each {how}"]
    lines = [line for place, way in enumerate(ways) for line in labelled("" if place else "layers", way)]
    if planned.bytes is not None:
        roughly = "at most " if planned.at_most else "about " if planned.about else ""
        what = "for these layers" if planned.chooses else "for all tensors of the model"
        lines += labelled("bytes", f"{roughly}{figures.size(planned.bytes)} {what}")
    return lines


def _block(size: int) -> str:
    return "a row a block" if size == -1 else f"blocks of {size}"


def _params(chosen: dict[str, object]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in redact.tree(chosen).items())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_value(item)}" for name, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return str(value)


def _count(value: int) -> str:
    return (
        f"{value / 1e9:.2f} billion"
        if value >= 1e9
        else f"{value / 1e6:.0f} million"
        if value >= 1e6
        else f"{value:,}"
    )


_LEARNT = {
    "all": "all tokens",
    "completion": "the last answer alone",
    "assistant": "the assistant's turns alone, each with the token that ends it",
    "pair": "the chosen answer against the rejected one",
}


def _form(info: ModelInfo) -> str:
    """Architecture; of a graph how many operators of which version."""
    if info.graph is None:
        return info.architecture
    opset = info.graph.opsets.get("")
    return f"{len(info.graph.nodes):,} nodes" + (f", opset {opset}" if opset else "")


def _place(info: ModelInfo) -> Path:
    return info.path if info.graph is None else info.path / info.graph.file


def _preview(shown: Preview) -> list[str]:
    if not shown.rows:
        return labelled("rows", "known when the run reads them")
    about = "about " if shown.estimated else ""
    roughly = "about " if shown.streamed else ""
    lines = labelled("rows", f"{roughly}{shown.rows:,} with columns {', '.join(shown.columns)}")
    if shown.streamed:
        lines += labelled("", "read as a stream; their tokens are kept on disk while training runs")
    if shown.max_rows:
        lines += labelled("", "a random choice of the data's rows: max_rows")
    for part in shown.parts:
        if len(shown.parts) > 1:
            form = part.format or "text"
            taught = _LEARNT[part.train_on]
            lines += labelled("from", f"{part.name}, {part.rows:,} rows, {form}, trains on {taught}")
        elif part.format:
            found = "found in the data" if part.detected else "named by the document"
            lines += labelled("format", f"{part.format}, {found}; rendered with {part.rendering}")
            lines += labelled("trains on", _LEARNT[part.train_on])
    if not shown.parts:  # numbers, which become no text
        return lines
    pairs = any(part.train_on == "pair" for part in shown.parts)
    unit = "pairs" if pairs else "blocks"
    lines += labelled(
        "tokens",
        f"{about}{shown.tokens:,} in {shown.blocks:,} {unit} of up to {shown.longest_block:,}, "
        f"{shown.trained_tokens:,} of them trained on",
    )
    if shown.eval_rows:
        lines += labelled("held out", f"{shown.eval_rows:,} rows, {shown.eval_blocks:,} {unit}")
    answers = (("chosen", shown.completion), ("rejected", shown.rejected))
    for label, text in (
        ("prompt", shown.prompt),
        *(answers if pairs else (("answer", shown.completion),)),
    ):
        lines += labelled(label, repr(shorten(text)))
    if shown.ids:
        learnt = [token for token, label in zip(shown.ids, shown.labels, strict=True) if label >= 0]
        lines += labelled("as tokens", f"{len(shown.ids)}, {len(learnt)} of them learnt: {_ids(shown.ids)}")
        if len(learnt) < len(shown.ids):
            lines += labelled("learnt", _ids(learnt))
    return lines


def _ids(ids: Sequence[int], limit: int = 24) -> str:
    half = limit // 2
    shown = (
        [str(token) for token in ids]
        if len(ids) <= limit
        else [*map(str, ids[:half]), "...", *map(str, ids[-half:])]
    )
    return " ".join(shown)


def shorten(text: str, limit: int = 300) -> str:
    """``text`` cut in the middle."""
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"
