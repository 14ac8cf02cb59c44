"""What another host than the first does in a run: its share of the steps that several hosts do together."""

from __future__ import annotations

import time
from collections.abc import Callable

from olive.engine.plan import Plan
from olive.errors import EnvironmentFault
from olive.models.artifact import Artifact
from olive.passes.base import Progress
from olive.store.store import Entry
from olive.systems.gang import run_together
from olive.systems.job import Job
from olive.systems.local import prepare_process

_LOOK = 1.0  # seconds between two looks for what the first host makes


def follow(
    plan: Plan,
    progress: Progress,
    job_of: Callable[[str, Artifact], Job],
    made: Callable[[str, Artifact], tuple[Entry | None, Artifact]],
) -> None:
    """Do this host's share, up to the last step that hosts do together; the first host does the rest.

    Args:
        plan: the same as the first host's: the same document and files in a shared folder.
        progress: where to say what is waited for.
        job_of: the job of a step on a model.
        made: what the store holds of a step on a model, and the artifact where it is there.

    Raises:
        EnvironmentFault: a step's result does not come.
        OliveError: what a process of this host raised.
    """
    if plan.model is None:
        return
    prepare_process()
    model: Artifact = plan.model
    together = [step.name for step in plan.steps if step.hosts > 1]
    for step in plan.steps[: 1 + max((i for i, s in enumerate(plan.steps) if s.hosts > 1), default=-1)]:
        entry, artifact = made(step.name, model)
        if entry is None and step.hosts > 1:
            progress.note(f"{step.name}: this host's share")
            run_together(job_of(step.name, model), progress)
        if step.name == together[-1]:
            return
        deadline = time.monotonic() + 24 * 3600
        while entry is None:
            if time.monotonic() > deadline:
                raise EnvironmentFault(
                    f"{step.name} did not come from the first host within a day",
                    fix="Look at what the first host says; all need the same cache_dir in a shared folder.",
                )
            time.sleep(_LOOK)
            entry, artifact = made(step.name, model)
        model = artifact
