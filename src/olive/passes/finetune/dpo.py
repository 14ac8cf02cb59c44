"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from olive.config.workflow import Accelerator
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.models.artifact import ModelInfo
from olive.passes.finetune.preference import Preference, PreferenceParams

if TYPE_CHECKING:
    from olive.passes.finetune.preference_loss import Objective

_SMOOTHED = ("robust", "exo_pair")


class DPO(Preference["DPO.Params"]):
    """Train an adapter to prefer chosen answers to rejected ones, more than the model it started from does.

    The reference is the model as training finds it: the base, or the base with the adapter gone on from.
    """

    class Params(PreferenceParams):
        """Names and defaults of TRL."""

        beta: float = Field(
            0.1, gt=0, description="How strongly the model is held to its start; tau of `ipo`."
        )
        loss_type: Literal[
            "sigmoid",
            "sigmoid_norm",
            "hinge",
            "ipo",
            "robust",
            "exo_pair",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
        ] = Field(
            "sigmoid",
            description="Loss of a pair: `sigmoid` is DPO as published; `ipo` (arXiv:2310.12036) and "
            "`sigmoid_norm` go by means over tokens; `robust` (arXiv:2403.00409) allows for wrong labels.",
        )
        label_smoothing: float = Field(
            0.0,
            ge=0,
            lt=0.5,
            description="Share of preferences taken to be the wrong way round; for `robust` and `exo_pair`.",
        )

    has_reference = True

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As of every method; smoothing and loss fit together."""
        yield from super().check(model, params, machine, accelerator)
        if params.label_smoothing and params.loss_type not in _SMOOTHED:
            yield Problem(
                f"label_smoothing has no effect on loss_type {params.loss_type}",
                where="label_smoothing",
                fix="set loss_type to robust, or remove label_smoothing",
            )
        if params.loss_type == "exo_pair" and not params.label_smoothing:
            yield Problem(
                "loss_type exo_pair is infinite without label_smoothing",
                where="label_smoothing",
                fix="set label_smoothing, for example to 0.001",
            )

    def objective(self, params: Params) -> Objective:
        """The loss of the parameters."""
        from olive.passes.finetune.preference_loss import DPOLoss

        return DPOLoss(params.loss_type, params.beta, params.label_smoothing)
