"""Whether each pass can go on from what the one before it makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from olive.config.base import PassParams
from olive.config.workflow import Accelerator, OnnxModel, PassEntry, Workflow
from olive.engine.defects import defect
from olive.engine.devices import (
    accelerator_of,
)
from olive.engine.keys import library_version
from olive.errors import OliveError, Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Kind, ModelInfo
from olive.models.quantised import METHOD, format_of, method_of
from olive.passes.base import Pass
from olive.passes.registry import resolve


def check_passes(workflow: Workflow, info: ModelInfo | None, machine: Machine) -> Iterator[Problem]:
    """Kinds, integers and libraries along the passes, and what each pass finds itself."""
    kind = Kind.ADAPTER if workflow.input_model.adapter_path else Kind.HF
    if isinstance(workflow.input_model, OnnxModel):
        kind = Kind.ONNX if info is None else info.kind
    before, stored = PassParams(), format_of(info.config) if info is not None else None
    integers, given = False, info is not None and method_of(info.config) == METHOD
    for name, entry in workflow.passes.items():
        technique: Pass[Any] = resolve(entry.type)()
        where = f"passes.{name}"
        fits = kind in technique.accepts
        if not fits:
            yield _wrong_kind(entry, technique, kind, where)
        if integers:
            yield from _placed(technique.check_integers(entry.params), where)
            yield from _placed(technique.check_settings(entry.params, before), where)
        if technique.needs_integers and not (integers or given):
            yield Problem(
                f"{entry.type} takes a model of integers, and none comes before it",
                where,
                "Put a quantising pass before it, e.g. KQuant.",
            )
        if given and not (technique.reads_integers or technique.makes_integers):
            yield Problem(
                f"{entry.type} takes a model in floating point, and the input model is stored as integers "
                f"({stored})",
                where,
                "Use the model in floating point as input_model.",
            )
        kind = technique.makes(kind)
        integers, given, before = technique.makes_integers, False, entry.params
        missing = [name for name in technique.libraries if library_version(name, machine) is None]
        if missing:
            ours = type(technique).__module__.startswith("olive.")
            what = f"'olive-next[{technique.extra}]'" if ours else " ".join(missing)
            yield Problem(
                f"{entry.type} needs {', '.join(missing)}, not installed",
                where,
                f"pip install {what}",
                exit_code=5,
            )
        if info is not None and fits:
            made_for = "execution_provider" in technique.hardware
            system = workflow.target if made_for else entry.host or workflow.host
            found = _own_check(technique, info, entry, machine, accelerator_of(workflow, system))
            if missing:  # what a missing library leads to
                found = (problem for problem in found if problem.exit_code not in (3, 5))
            yield from _placed(found, where)
            info = left(technique, info, entry)


def left(technique: Pass[Any], info: ModelInfo, entry: PassEntry) -> ModelInfo:
    """What a plan knows of the model after a pass."""
    try:
        return technique.leaves(info, entry.params)
    except (Exception, SystemExit):  # noqa: BLE001 - third-party code, whose check has said what is wrong
        return info


def _wrong_kind(entry: PassEntry, technique: Pass[Any], kind: Kind, where: str) -> Problem:
    wanted = " or ".join(item.value for item in technique.accepts)
    first = next(
        (maker for taken, maker in _MAKERS.items() if taken in technique.accepts), "MergeAdapterWeights"
    )
    fix = f"Reorder the passes, or put {first} before it."
    if kind in (Kind.ONNX, Kind.GENAI):
        fix = "Put it before the export, or start from the HfModel that the graph was made of."
    return Problem(
        f"{entry.type} takes a model of kind {wanted}, and what comes before it makes {kind.value}",
        where,
        fix,
    )


_MAKERS = {Kind.ADAPTER: "LoRA", Kind.ONNX: "ModelBuilder"}


def _placed(problems: Iterable[Problem], where: str) -> Iterator[Problem]:
    """With the step's place before their own."""
    for problem in problems:
        place = where if problem.where is None else f"{where}.{problem.where}"
        yield Problem(problem.message, place, problem.fix, problem.severity, problem.exit_code)


def _own_check(
    technique: Pass[Any], info: ModelInfo, entry: PassEntry, machine: Machine, accelerator: Accelerator
) -> Iterator[Problem]:
    """What the pass itself finds; its own defects are told to its developer."""
    try:
        yield from technique.check(info, entry.params, machine, accelerator)
    except OliveError as error:
        yield from error.problems
    except (Exception, SystemExit) as error:  # noqa: BLE001 - third-party code
        yield defect(entry, "check", error)
