"""What a run did: small values, serialised as run.json and drawn by the report."""

from __future__ import annotations

from typing import Any

from olive.config.base import Frozen
from olive.evaluation.score import Score
from olive.models.artifact import Kind


class Finding(Frozen):
    """A warning or note of the plan or the run."""

    severity: str
    message: str
    where: str | None = None
    fix: str | None = None


class GateResult(Frozen):
    """One gate between stages.

    Attributes:
        gate: its name, as in ``gates`` of the document.
        passed: an artifact whose gate failed is never stored; where this is false, the document allowed a
            fallback, and the gate of the same name after it held what the step made in the end.
        figures: measured numbers, e.g. ``kl`` (nat a token), ``top1`` (share of positions).
        limits: figure name -> limit it was held against.
        text: one line for people, e.g. a generated answer.
        layers: of a quantised model, what each layer alone costs the predictions: KL, nat a token, estimated.
    """

    gate: str
    passed: bool
    figures: dict[str, float] = {}
    limits: dict[str, float] = {}
    text: str = ""
    layers: dict[str, float] = {}


class StepResult(Frozen):
    """One step of the run.

    Attributes:
        name, type: as in the document.
        key: cache key, 64 hex digits.
        cached: served from the store.
        seconds: wall time when it was computed (also for a cached step: then it was spent earlier).
        peak_memory: bytes of resident memory at the peak of the step, when computed.
        kind: form of the model it made.
        digest: of that model.
        size: bytes on disk.
        gates: results of the gates after it.
        scores: the document's evaluator on this step's model; empty when not asked.
        series: curves; ``loss``: list of {step, loss, tokens_per_second?, learning_rate?, eval_loss?}.
        facts: JSON facts the pass recorded (dtype, trainable parameters, blocks, ...).
    """

    name: str
    type: str
    key: str
    cached: bool
    seconds: float
    peak_memory: int
    kind: Kind
    digest: str
    size: int
    gates: tuple[GateResult, ...] = ()
    scores: tuple[Score, ...] = ()
    series: dict[str, list[dict[str, float]]] = {}
    facts: dict[str, Any] = {}


class RunResult(Frozen):
    """The whole run.

    Attributes:
        document: the document in today's spelling, as it ran (secrets are references).
        input_size: bytes of the input model on disk.
        input_scores: the evaluator on the input model.
        steps: in order; the last one's model is in ``model/``.
        output_dir: only in memory: run.json holds paths relative to itself.
        machine: JSON facts of the hardware.
        versions: package -> version.
        started: ISO 8601, UTC.
        seconds, cpu_seconds, peak_memory: of this run, bytes.
        findings: warnings and notes.
        prompt_template: text before the answer, with ``{field}`` of the prompt columns; null for a chat
            template.
        sample: {"prompt": ..., "completion": ...} one rendered row, when the document has data.
    """

    document: dict[str, Any]
    input_size: int
    input_scores: tuple[Score, ...] = ()
    steps: tuple[StepResult, ...]
    output_dir: str = "."
    machine: dict[str, Any]
    versions: dict[str, str]
    started: str
    seconds: float
    cpu_seconds: float
    peak_memory: int
    findings: tuple[Finding, ...] = ()
    prompt_template: str | None = None
    sample: dict[str, str] | None = None
    tool: str = "olive-next"
