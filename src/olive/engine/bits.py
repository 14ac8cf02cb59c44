"""How many layers get how many bits, followed through the steps of a plan. No torch."""

from __future__ import annotations

from olive.config.workflow import Accelerator, PassEntry
from olive.engine.chain import left
from olive.engine.defects import defect
from olive.errors import OliveError, Problem
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import describe
from olive.passes.bits import PlannedBits
from olive.passes.registry import resolve


class BitsByStep:
    """What each step makes of the layers' bits; asked of every step in order.

    Args:
        info: the input model.
        target: what the model is made for.
        findings: told of what a pass raises.
    """

    def __init__(self, info: ModelInfo, target: Accelerator, findings: list[Problem]) -> None:
        self._info, self._target, self._findings = info, target, findings
        self._before: PlannedBits | None = None
        self._about = False

    def of(self, entry: PassEntry, model: Artifact | None) -> PlannedBits | None:
        """Bits that the next step gives; None where it makes no integers, or that cannot be told.

        Args:
            entry: the step.
            model: what it works on; None until the steps before it have run.
        """
        info = self._info
        try:
            if model is not None and model.kind is Kind.HF:
                info = info if model.path == info.path else describe(model.path)
                self._before, self._about = None, False  # a choice lies beside the model
            found = resolve(entry.type)().bits(info, entry.params, self._target, self._before)
        except OliveError:  # its check says so
            found = None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - third-party code
            self._findings.append(defect(entry, "bits", error))
            found = None
        if found is not None and self._about:
            found = found.model_copy(update={"about": True})
        self._info = left(resolve(entry.type)(), info, entry)
        self._before = found if found is not None and found.chooses else None
        # a merge may store wider floats than its base has
        self._about = self._about or found is None
        return found
