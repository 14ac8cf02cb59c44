"""Low-rank Hadamard products (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from olive.passes.finetune.tuning import Tuning, TuningParams

if TYPE_CHECKING:
    from peft import PeftConfig


class HadamardParams(TuningParams):
    """What LoHa and LoKr have in common."""

    r: int = Field(64, ge=1, description="Rank of the factors.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    rank_dropout: float = Field(0.0, ge=0, lt=1, description="Probability to drop a row of the update.")
    module_dropout: float = Field(0.0, ge=0, lt=1, description="Probability to leave a layer's update out.")


class LoHa(Tuning["LoHa.Params"]):
    """Fine-tune the elementwise product of two low-rank matrices: rank r^2 for twice the numbers."""

    class Params(HadamardParams):
        """Names and defaults of Olive 0.13."""

    def peft_config(self, params: Params, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=params.r,
            alpha=params.alpha,
            rank_dropout=params.rank_dropout,
            module_dropout=params.module_dropout,
            **params.placement(modules),
        )

    def parameters_of(self, params: Params, rows: int, columns: int) -> int:
        """Two pairs of (rows, r) and (r, columns)."""
        return 2 * params.r * (rows + columns)
