"""What the methods that learn from preferences share: low-rank adapters, trained on pairs of answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pydantic import Field

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, ModelInfo
from olive.passes.base import Cost, PassContext
from olive.passes.finetune.lora import LoraParams, LowRank

if TYPE_CHECKING:
    from olive.passes.finetune.preference_loss import Objective
    from olive.passes.finetune.trainer import PackedTrainer

_SHOWN = ("accuracies", "margins", "chosen", "rejected")


class PreferenceParams(LoraParams):
    """Settings of LoRA, on preference data."""

    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input; 0 compares like with like."
    )


P = TypeVar("P", bound=PreferenceParams)


class Preference(LowRank[P]):
    """Base of the passes that train an adapter on pairs of a chosen and a rejected answer."""

    pairs = True
    measured = ("loss", *(f"rewards/{name}" for name in _SHOWN))
    strategies = ("ddp",)  # the reference is the trained tensors of the start, put back for one pass
    has_reference: ClassVar[bool]

    @abstractmethod
    def objective(self, params: P) -> Objective:
        """What is minimised."""

    def trainer(self, params: P) -> Callable[..., PackedTrainer]:
        """What trains."""
        from olive.passes.finetune.preference_trainer import PreferenceTrainer

        return partial(PreferenceTrainer, objective=self.objective(params))

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As of every method; smoothing of tokens has no meaning here."""
        yield from super().check(model, params, machine, accelerator)
        if params.training_args.get("label_smoothing_factor"):
            yield Problem(
                "training_args.label_smoothing_factor smooths the tokens of a cross entropy, and pairs are "
                "compared here",
                where="training_args",
                fix="remove it; label_smoothing of DPO allows for preferences that are the wrong way round",
            )

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """As of every method; the reference of each pair takes one forward pass of three."""
        cost = super().estimate(model, params, machine, data)
        if not self.has_reference or cost.seconds is None:
            return cost
        args = params.training_args
        epochs = float(args.get("num_train_epochs", 3)) if int(args.get("max_steps", -1)) <= 0 else 1.0
        return cost.model_copy(update={"seconds": cost.seconds * (1 + 0.5 / max(1.0, epochs))})

    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Train; the last rewards go to the facts, those of the held-out pairs where there are any."""
        super().run(model, params, ctx)
        for prefix in ("", "eval_"):
            names = {f"{prefix}rewards/{name}": f"{prefix}rewards_{name}" for name in _SHOWN}
            known = [point for point in ctx.series["loss"] if f"{prefix}rewards/margins" in point]
            if known:
                ctx.facts |= {fact: round(known[-1][name], 6) for name, fact in names.items()}
