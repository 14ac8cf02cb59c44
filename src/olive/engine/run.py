"""Carry a plan out: steps through the store, gates, evaluation, delivery."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.config.workflow import Evaluator, PassEntry
from olive.data.rows import is_local
from olive.engine.devices import accelerator_of, devices_of, host_number
from olive.engine.follow import follow
from olive.engine.gates.compare import References
from olive.engine.keys import data_names, evaluation_parts
from olive.engine.output import MODEL, TRACKING
from olive.engine.plan import Plan, PlannedStep, parts_of, stored_artifact
from olive.engine.prompts import rendered_sample, sample_prompts
from olive.engine.result import Finding, GateResult, RunResult, StepResult
from olive.errors import GateFailed, InternalError, Problem, Severity, raise_errors
from olive.evaluation.score import Score
from olive.hardware.memory import peak_memory
from olive.models.artifact import Artifact
from olive.models.hf import describe
from olive.passes.base import PassContext, Progress
from olive.passes.registry import resolve
from olive.store.keys import key as make_key
from olive.store.store import Entry, Store
from olive.systems.job import Job
from olive.systems.local import execute, failures_named, prepare_process

if TYPE_CHECKING:
    from olive.engine.fallback import Ladder


@dataclass(slots=True)
class _Run:
    """State of a run in progress."""

    plan: Plan
    store: Store
    progress: Progress
    peak: int = 0
    findings: list[Problem] = field(default_factory=list)
    prompts: list[list[int]] | None = None
    known: References = field(default_factory=References)

    def planned(self, name: str) -> PlannedStep:
        """The step in the plan."""
        return next(step for step in self.plan.steps if step.name == name)

    @property
    def memo(self) -> Path:
        return self.store.root / "digests.json"


def run(plan: Plan, progress: Progress) -> RunResult:
    """Carry ``plan`` out and deliver the model to its output folder.

    Raises:
        OliveError: an error of the plan, a pass, a gate or the environment; finished steps are kept.
    """
    raise_errors(plan.findings)
    if plan.model is None:
        raise InternalError("a plan without errors has no input model")
    prepare_process()
    if all(is_local(plan.workflow.data_config(name), plan.base_dir) for name in plan.previews):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with closing(Store(plan.store_root)) as store:
        return _run(_Run(plan, store, progress), plan.model)


def take_part(plan: Plan, progress: Progress) -> None:
    """Do another host's share of ``plan``; the first host carries it out.

    Raises:
        OliveError: an error of the plan or of this host's processes.
    """
    raise_errors(plan.findings)
    with closing(Store(plan.store_root)) as store:
        state = _Run(plan, store, progress)

        def made(name: str, model: Artifact) -> tuple[Entry | None, Artifact]:
            found = store.lookup(
                make_key(parts_of(plan.loaded, plan.workflow.passes[name], model, plan.machine, store.root))
            )
            return found, model if found is None else stored_artifact(found, model)

        def job_of(name: str, model: Artifact) -> Job:
            entry = plan.workflow.passes[name]
            key = make_key(parts_of(plan.loaded, entry, model, plan.machine, store.root))
            # its processes write nothing there: the first one of all does
            return _job(state, name, entry, model, plan.store_root, store.journal(key).path)

        follow(plan, progress, job_of, made)


def _run(state: _Run, given: Artifact) -> RunResult:
    plan, progress, workflow = state.plan, state.progress, state.plan.workflow
    started, clock, cpu = datetime.now(UTC), time.monotonic(), time.process_time()
    input_scores: tuple[Score, ...] = ()
    if workflow.evaluator and workflow.evaluate_input_model:
        progress.note("evaluating the input model")
        input_scores = _evaluate(state, workflow.evaluators[workflow.evaluator], given)
    steps, last, model = [], None, given
    names = list(workflow.passes)
    for name, entry in workflow.passes.items():
        result, last, model = _step(state, name, entry, model)
        evaluator = entry.evaluator or (workflow.evaluator if name == names[-1] else None)
        if evaluator:
            progress.note(f"evaluating the result of {name}")
            scores = _evaluate(state, workflow.evaluators[evaluator], model)
            result = result.model_copy(update={"scores": scores})
        steps.append(result)
    if last is None:
        raise InternalError("a plan without passes was run")
    state.store.materialise(last, plan.output_dir / MODEL)
    sample, template = rendered_sample(plan)
    return RunResult(
        document=plan.document,
        input_size=_size(given.path),
        input_scores=input_scores,
        steps=tuple(steps),
        output_dir=str(plan.output_dir),
        machine=plan.machine.model_dump(mode="json", exclude={"packages", "memory_available"}),
        versions=plan.machine.packages,
        started=started.isoformat(timespec="seconds"),
        seconds=time.monotonic() - clock,
        cpu_seconds=time.process_time() - cpu,
        peak_memory=max([state.peak, peak_memory(), *(s.peak_memory for s in steps if not s.cached)]),
        findings=tuple(
            Finding(severity=p.severity.value, message=p.message, where=p.where, fix=p.fix)
            for p in [*plan.findings, *state.store.findings, *state.findings]
            if p.severity is not Severity.ERROR
        ),
        prompt_template=template,
        sample=sample,
    )


def _step(state: _Run, name: str, entry: PassEntry, model: Artifact) -> tuple[StepResult, Entry, Artifact]:
    parts = parts_of(state.plan.loaded, entry, model, state.plan.machine, state.store.root)
    key = make_key(parts)
    found = state.store.lookup(key)
    cached = found is not None
    if found is None:
        waiting = "another run computes this step; waiting for it"
        with state.store.claim(key, lambda: state.progress.note(f"{name}: {waiting}")):
            found = state.store.lookup(key) or _compute(state, name, entry, model, key, parts)
    return _step_result(name, found, cached), found, stored_artifact(found, model)


def _compute(
    state: _Run, name: str, entry: PassEntry, model: Artifact, key: str, parts: dict[str, Any]
) -> Entry:
    """Run a step that the store does not hold, hold it against its gates, and store it.

    Where a gate refuses what a quantiser made and its parameters allow a fallback, the next rung is tried.
    """
    ladder = None
    if getattr(entry.params, "fallback", False):
        from olive.engine.fallback import Ladder

        target = accelerator_of(state.plan.workflow, state.plan.workflow.target)
        ladder = Ladder(entry, describe(model.path), state.plan.machine, target)
    tried = entry
    while True:
        try:
            return _attempt(state, name, tried, model, key, parts, ladder)
        except _Refused as refused:
            if ladder is None:
                raise refused.error from None
            attempt = ladder.descend(refused.error, refused.facts)
            said = f"{ladder.failed[-1].text}; falling back to {attempt.text}"
            state.progress.note(f"{name}: {said}")
            state.findings.append(Problem(said, f"step {name}", severity=Severity.WARNING))
            tried = entry.model_copy(update={"type": attempt.type, "params": attempt.params})


class _Refused(Exception):
    """A gate refused what a step made."""

    def __init__(self, error: GateFailed, facts: dict[str, Any]) -> None:
        self.error, self.facts = error, facts


def _attempt(
    state: _Run,
    name: str,
    entry: PassEntry,
    model: Artifact,
    key: str,
    parts: dict[str, Any],
    ladder: Ladder | None,
) -> Entry:
    """Run a step, by its entry or by what a fallback made of that, and store it under ``key``."""
    technique = resolve(entry.type)
    fallen = ladder is not None and bool(ladder.failed)
    own = {"fallback": [entry.type, entry.params.model_dump(mode="json")]} if fallen else {}
    journal = state.store.journal(make_key(parts | own))
    needed = state.planned(name).cost.disk
    with state.store.stage(needed=needed) as staging:
        job = _job(state, name, entry, model, staging.path, journal.path)
        result, ctx = execute(job, state.progress)
        state.findings += result.findings
        try:
            with failures_named(job.place, job.out):
                gates = _gates(state, job, ctx)
        except GateFailed as error:
            journal.clear()
            raise _Refused(error, result.facts) from error
        if ladder is not None and fallen:
            result.facts["fallback"] = ladder.passed(gates)
            gates = [*ladder.failed, *gates]
        meta = {
            "step": name,
            "type": state.plan.workflow.passes[name].type,
            "kind": technique.produces.value,
            "attributes": result.attributes,
            "facts": result.facts,
            "series": result.series,
            "seconds": result.seconds,
            "peak_memory": result.peak_memory,
            "gates": [gate.model_dump(mode="json") for gate in gates],
        }
        with failures_named(job.place, job.out):
            found = state.store.publish(staging, key, meta, parts)
        state.known.moved(staging.path, found.path)
    journal.clear()
    return found


def _job(state: _Run, name: str, entry: PassEntry, model: Artifact, out: Path, journal: Path) -> Job:
    """A step as a job."""
    plan, workflow = state.plan, state.plan.workflow
    planned, host = state.planned(name), entry.host or workflow.host
    devices = devices_of(workflow, host)
    return Job(
        step=name,
        type=entry.type,
        params=entry.params.model_dump(mode="json"),
        model=model,
        data={data: workflow.data_config(data) for data in data_names(entry)},
        base_dir=plan.base_dir,
        accelerator=accelerator_of(workflow, host),
        target=accelerator_of(workflow, workflow.target),
        out=out,
        journal=journal,
        tracking=plan.output_dir / TRACKING,
        processes=planned.processes,
        strategy=planned.strategy,
        hosts=planned.hosts,
        host=host_number(devices) or 0,
        address=devices.address if planned.hosts > 1 else None,
    )


def _step_result(name: str, entry: Entry, cached: bool) -> StepResult:
    meta: dict[str, Any] = entry.meta
    return StepResult(
        name=name,
        type=meta["type"],
        key=entry.key,
        cached=cached,
        seconds=meta["seconds"],
        peak_memory=meta["peak_memory"],
        kind=meta["kind"],
        digest=entry.digest,
        size=entry.size,
        gates=tuple(GateResult.model_validate(gate) for gate in meta["gates"]),
        series=meta["series"],
        facts=meta["facts"],
    )


def _gates(state: _Run, job: Job, ctx: PassContext) -> list[GateResult]:
    """Hold what a step made against its gates; a failure raises and nothing is stored."""
    from olive.engine.gates import bundle, equivalence, integers, merge, parity

    checks: dict[str, Callable[..., GateResult]] = {
        "merge": merge.check,
        "parity": parity.check,
        "bundle": bundle.check,
        "integers": integers.check,
        "equivalence": equivalence.check,
    }
    asked = []
    for name in resolve(job.type).gates:
        if getattr(state.plan.workflow.gates, name).enabled:
            asked.append(name)
            continue
        message = f"the {name} gate is switched off by the document"
        state.findings.append(Problem(message, job.step, severity=Severity.WARNING))
    if asked and state.prompts is None:
        state.prompts = sample_prompts(state.plan, state.plan.workflow.gates.parity.prompts)

    def hold(name: str) -> GateResult:
        settings = getattr(state.plan.workflow.gates, name)
        return checks[name](job.model, job.out, settings, ctx, state.prompts, state.known)

    # The second of two waits for a process of its own: both at once.
    with ThreadPoolExecutor(1) as beside:
        others = [beside.submit(hold, name) for name in asked[1:]]
        for name in asked:
            state.progress.note(f"{name} gate")
        return [hold(name) for name in asked[:1]] + [other.result() for other in others]


def _evaluate(state: _Run, evaluator: Evaluator, model: Artifact) -> tuple[Score, ...]:
    """Scores of a model, from the store when this very evaluation has run here before."""
    import json

    plan = state.plan
    key_parts = evaluation_parts(evaluator, model, plan.workflow, plan.machine, plan.base_dir, state.memo)
    key = make_key(key_parts)
    found = state.store.lookup(key)
    if found is None:
        from olive.evaluation.evaluate import evaluate

        with failures_named(f"evaluation of the {model.kind.value} model", state.store.root):
            scores = evaluate(
                model,
                evaluator,
                data=_by_name(plan),
                base_dir=plan.base_dir,
                machine=plan.machine,
                accelerator=accelerator_of(plan.workflow, plan.workflow.target),
                progress=state.progress,
            )
        with state.store.stage() as staging:
            body = json.dumps([score.model_dump(mode="json") for score in scores])
            (staging.path / "scores.json").write_text(body, encoding="utf-8")
            found = state.store.publish(staging, key, {"type": "evaluation", "kind": "scores"}, key_parts)
        state.peak = max(state.peak, peak_memory())
    listed = json.loads((found.path / "scores.json").read_text(encoding="utf-8"))
    return tuple(Score.model_validate(item) for item in listed)


def _by_name(plan: Plan) -> Mapping[str, Any]:
    return {config.name: config for config in plan.workflow.data_configs}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
