"""Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from olive.passes.finetune.preference import Preference, PreferenceParams

if TYPE_CHECKING:
    from olive.passes.finetune.preference_loss import Objective


class ORPO(Preference["ORPO.Params"]):
    """Train an adapter on chosen answers, with a penalty on the odds of rejected ones; there is no reference.

    Cross entropy of prompt and chosen answer, and ``beta`` times the log-sigmoid of the log odds ratio.
    """

    class Params(PreferenceParams):
        """Names and defaults of TRL."""

        beta: float = Field(0.1, gt=0, description="Weight of the odds ratio; lambda in the paper.")

    has_reference = False

    def objective(self, params: Params) -> Objective:
        """The loss of the parameters."""
        from olive.passes.finetune.preference_loss import ORPOLoss

        return ORPOLoss(params.beta)
