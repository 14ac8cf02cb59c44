"""Down from a failed parity gate, a rung at a time: other settings of the step, as the document allows.

Rungs, the cheapest first: 8 bits for the head, 8 bits for the MLPs' outputs, a smaller block, and Gptq.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from olive.config.workflow import Accelerator, PassEntry
from olive.engine.result import GateResult
from olive.engine.rungs import changes
from olive.errors import GateFailed, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import ModelInfo
from olive.passes.quantize.targets import RUNGS, Override, QuantizeParams
from olive.passes.registry import resolve


@dataclass(frozen=True, slots=True)
class Attempt:
    """A pass with its parameters; ``rung`` and ``text`` say what was changed for it, empty at first."""

    type: str
    params: QuantizeParams
    rung: str = ""
    text: str = "as the document has it"


class Ladder:
    """The attempts of one step, and what their gates said.

    Args:
        entry: the step; it has rungs only where its parameters allow a fallback.
        info: the model that is quantised.
        machine, target: what the pass's own check is asked about.

    Attributes:
        attempt: what is to be tried now.
        failed, tried: of each attempt that failed, its gate and what was changed for it.
        facts: figures of each.
    """

    def __init__(self, entry: PassEntry, info: ModelInfo, machine: Machine, target: Accelerator) -> None:
        if not isinstance(entry.params, QuantizeParams):
            raise TypeError(f"{entry.type} is no quantising pass")
        self.attempt = Attempt(entry.type, entry.params)
        self.failed: list[GateResult] = []
        self.tried: list[str] = []
        self.facts: list[dict[str, Any]] = []
        self._info, self._machine, self._target = info, machine, target
        allowed = entry.params.fallback
        self._left = list(RUNGS if allowed is True else allowed or ())

    def descend(self, error: GateFailed, facts: Mapping[str, Any]) -> Attempt:
        """Record a failed gate and go to the next rung that changes something and fits the model.

        Args:
            error: the gate's.
            facts: of the attempt that failed: its ``layers``.

        Raises:
            GateFailed: no rung is left.
        """
        message = error.problems[0].message
        figures = {name: value for name, value in error.figures.items() if isfinite(value)}
        text = f"{self.attempt.type}, {self.attempt.text}: {message.removeprefix('parity gate: ')}"
        self.failed.append(
            GateResult(gate="parity", passed=False, figures=figures, limits=error.limits, text=text)
        )
        self.tried.append(self.attempt.text)
        self.facts.append(
            {"rung": self.attempt.rung or None, "change": self.attempt.text, "passed": False, **figures}
        )
        while self._left:
            # a block may become smaller more than once
            rung = self._left[0]
            found = next(filter(self._fits, self._changed(rung, facts.get("layers") or [])), None)
            if rung != "group_size" or found is None:
                self._left.pop(0)
            if found is not None:
                self.attempt = found
                return found
        if len(self.failed) == 1:
            raise error
        story = "; ".join(gate.text for gate in self.failed)
        raise GateFailed(
            f"{message}, on the last rung of the fallback. {story}",
            where=error.problems[0].where,
            fix='Set "bits": 8, use SelectiveMixedPrecision with a larger budget before it, or loosen '
            "gates.parity.",
            figures=error.figures,
            limits=error.limits,
        )

    def passed(self, gates: list[GateResult]) -> list[dict[str, Any]]:
        """Figures of every attempt, the one that passed last; for the step's facts."""
        figures = next((gate.figures for gate in gates if gate.gate == "parity"), {})
        own = {"rung": self.attempt.rung or None, "change": self.attempt.text, "passed": True}
        return [*self.facts, own | {name: figures[name] for name in ("kl", "top1") if name in figures}]

    def _changed(self, rung: str, rows: list[dict[str, Any]]) -> Iterator[Attempt]:
        """The attempts of a rung, the one to prefer first; none where it would change nothing."""
        if rung != "Gptq":
            for change in changes(rung, rows):
                yield self._with(rung, change.text, change.overrides)
        elif self.attempt.type != "Gptq" and (data := _data(self.attempt.params)):
            shared = {name: getattr(self.attempt.params, name) for name in QuantizeParams.model_fields}
            params = resolve("Gptq").Params.model_validate(shared | {"data_config": data})
            if isinstance(params, QuantizeParams):
                yield Attempt("Gptq", params, rung, "Gptq in its place")

    def _with(self, rung: str, text: str, new: Mapping[str, Override]) -> Attempt:
        """The attempt with more overrides, each behind those that it outranks."""
        params, merged = self.attempt.params, dict(self.attempt.params.overrides)
        for name, one in new.items():
            earlier = merged.pop(name, Override())
            merged[name] = earlier.model_copy(update=one.model_dump(exclude_none=True))
        return Attempt(self.attempt.type, params.model_copy(update={"overrides": merged}), rung, text)

    def _fits(self, attempt: Attempt) -> bool:
        found = resolve(attempt.type)().check(self._info, attempt.params, self._machine, self._target)
        return not any(problem.severity is Severity.ERROR for problem in found)


def _data(params: QuantizeParams) -> str | None:
    """Data that Gptq may calibrate on."""
    own = getattr(params, "data_config", None)
    return params.fallback_data_config or (str(own) if own else None)
