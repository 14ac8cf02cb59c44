"""Hold what a step made against the gates of its pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from olive.config.gates import Gates
from olive.engine.gates import bundle, equivalence, graph, integers, merge, parity
from olive.engine.gates.compare import References
from olive.engine.result import GateResult
from olive.passes.base import PassContext
from olive.systems.job import Job

_CHECKS: dict[str, Callable[..., GateResult]] = {
    "merge": merge.check,
    "parity": parity.check,
    "bundle": bundle.check,
    "integers": integers.check,
    "graph": graph.check,
    "equivalence": equivalence.check,
}


def hold(
    job: Job,
    ctx: PassContext,
    names: Sequence[str],
    settings: Gates,
    prompts: list[list[int]],
    known: References,
) -> list[GateResult]:
    """Results of the gates ``names``, in order; a failure raises and nothing is stored.

    Args:
        job: what made the model in ``job.out`` of ``job.model``.
        ctx: its context.
        names: of the gates.
        settings: the document's, of every gate.
        prompts: token ids.
        known: logits of the model that a gate ran last.
    """

    def one(name: str) -> GateResult:
        return _CHECKS[name](job.model, job.out, getattr(settings, name), ctx, prompts, known)

    # The second of two waits for a process of its own: both at once.
    with ThreadPoolExecutor(1) as beside:
        others = [beside.submit(one, name) for name in names[1:]]
        for name in names:
            ctx.progress.note(f"{name} gate")
        return [one(name) for name in names[:1]] + [other.result() for other in others]
