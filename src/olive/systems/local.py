"""Run a job on this machine: in this process, or in several together."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from olive.errors import EnvironmentFault, InternalError, OliveError, PassFailed
from olive.hardware.memory import collect_seldom, peak_memory, release_memory, reset_peak_memory
from olive.hardware.probe import probe
from olive.models.artifact import Kind
from olive.passes.base import Pass, PassContext, Place, Progress
from olive.passes.registry import resolve
from olive.store.faults import environment_fault, full_disk
from olive.store.journal import Journal
from olive.systems.job import Job, JobResult


def context(job: Job, progress: Progress, place: Place | None = None) -> PassContext:
    """What the pass of ``job`` is given."""
    place, machine = place or Place(), probe()
    if place.local_size > 1:
        machine = machine.model_copy(update={"cores": max(1, machine.cores // place.local_size)})
    return PassContext(
        out=job.out,
        machine=machine,
        accelerator=job.accelerator,
        target=job.target,
        data=job.data,
        base_dir=job.base_dir,
        progress=progress,
        journal=Journal(job.journal),
        step=job.step,
        tracking=job.tracking,
        place=place,
    )


def execute(job: Job, progress: Progress, place: Place | None = None) -> tuple[JobResult, PassContext]:
    """Run the pass into ``job.out`` and check what it wrote.

    Args:
        job: the job.
        progress: where to say how far it is.
        place: of this process among those that run the job together; None starts as many as the job needs.

    Raises:
        EnvironmentFault: disk or memory ran out.
        PassFailed: the pass raised, or its artifact is not what it declares.
    """
    if place is None and job.processes > 1:
        from olive.systems.gang import run_together

        result = run_together(job, progress)
        if result is None:
            raise InternalError("another host than the first executed a job for its result")
        return result, context(job, progress)
    prepare_process()
    technique = resolve(job.type)()
    params = technique.Params.model_validate(job.params)
    ctx = context(job, progress, place)
    release_memory()
    reset_peak_memory()
    started = time.monotonic()
    with failures_named(job.place, job.out):
        technique.run(job.model, params, ctx)
        if ctx.place.rank == 0:
            _ensure(technique, job.out, job.model.kind)
        release_memory()
        return _result(ctx, time.monotonic() - started), ctx


def _result(ctx: PassContext, seconds: float) -> JobResult:
    """What the pass recorded; it has to fit into JSON, which knows no NaN."""
    try:
        json.dumps([ctx.attributes, ctx.facts, ctx.series], allow_nan=False)
        return JobResult(
            attributes=ctx.attributes,
            facts=ctx.facts,
            series=ctx.series,
            seconds=seconds,
            peak_memory=peak_memory(),
            findings=tuple(ctx.journal.findings),
        )
    except (TypeError, ValueError) as error:
        raise PassFailed(
            f"what was recorded beside the model is no JSON: {error}",
            fix="Pass developer: put finite numbers and text into ctx.facts, ctx.series and ctx.attributes.",
        ) from error


def _ensure(technique: Pass[Any], out: Path, given: Kind) -> None:
    """Hold what the pass wrote against what it declares; a finding says who must act."""
    try:
        technique.ensure(out, given)
    except PassFailed as error:
        raise PassFailed(
            problems=[
                replace(problem, fix=problem.fix or "Pass developer: write files that load into ctx.out.")
                for problem in error.problems
            ]
        ) from error


class failures_named:  # noqa: N801 - a context manager, used as a verb
    """Turn whatever third-party code raises into an error that names the step and who must act.

    Args:
        where: the step, as messages name it.
        out: the folder it writes to.
    """

    def __init__(self, where: str, out: Path) -> None:
        self.where, self.out = where, out

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        where = self.where
        if isinstance(error, PassFailed) and any(problem.where is None for problem in error.problems):
            named = [replace(problem, where=problem.where or where) for problem in error.problems]
            raise PassFailed(problems=named) from error
        if isinstance(error, OliveError) or not isinstance(error, Exception | SystemExit):
            return
        if isinstance(error, SystemExit):
            raise PassFailed(
                f"something in it ended the program (exit {error.code})",
                where=where,
                fix="Pass developer: raise an exception that says what is wrong.",
            ) from error
        full = full_disk(error, self.out)
        if full is not None:
            raise environment_fault(full, self.out, where) from error
        if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
            raise EnvironmentFault(
                f"memory ran out: {error}",
                where=where,
                fix="Lower max_seq_len or the batch size, or use a larger machine.",
            ) from error
        raise PassFailed(
            f"{type(error).__name__}: {error}", where=where, fix="Run again with --debug for the traceback."
        ) from error


def prepare_process() -> None:
    """Before heavy libraries load: keep them from the network and off the progress bar, and memory cheap.

    torch asks for huge pages when told to; on a virtual machine, faults of 4 KiB are a fifth of the time.
    """
    collect_seldom()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # PEFT loads it where it is installed, and it tells of kernels that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
