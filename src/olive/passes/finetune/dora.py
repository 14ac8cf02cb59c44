"""Weight-decomposed low-rank adaptation (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive.models.artifact import Artifact
from olive.passes.base import PassContext
from olive.passes.finetune.lora import LoraParams, lora_config
from olive.passes.finetune.tuning import Tuning

if TYPE_CHECKING:
    from typing import Any

    from peft import PeftConfig


class DoRA(Tuning["DoRA.Params"]):
    """Fine-tune the direction of each weight with low-rank factors and its length by a number a row."""

    class Params(LoraParams):
        """Names and defaults of Olive 0.13."""

    def peft_config(self, params: Params, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        return lora_config(params, modules, use_dora=True)

    def parameters_of(self, params: Params, rows: int, columns: int) -> int:
        """A (r, columns), B (rows, r) and a length a row."""
        return params.r * (rows + columns) + rows

    def save(self, tuned: Any, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the adapter."""
        super().save(tuned, model, params, ctx)
        ctx.attributes |= {"r": params.r, "alpha": params.alpha}
