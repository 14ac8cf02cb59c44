"""Low-rank Kronecker products (Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from pydantic import Field

from olive.passes.finetune.loha import HadamardParams
from olive.passes.finetune.tuning import Tuning

if TYPE_CHECKING:
    from peft import PeftConfig


class LoKr(Tuning["LoKr.Params"]):
    """Fine-tune a Kronecker product whose larger factor is of low rank: the fewest numbers of all."""

    class Params(HadamardParams):
        """Names and defaults of Olive 0.13."""

        decompose_both: bool = Field(False, description="Let the smaller factor be of low rank too.")
        decompose_factor: int = Field(
            -1, ge=-1, description="Size of the smaller factor; -1: near the square root."
        )

    def peft_config(self, params: Params, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=params.r,
            alpha=params.alpha,
            rank_dropout=params.rank_dropout,
            module_dropout=params.module_dropout,
            decompose_both=params.decompose_both,
            decompose_factor=params.decompose_factor,
            **params.placement(modules),
        )

    def parameters_of(self, params: Params, rows: int, columns: int) -> int:
        """A small whole matrix and a larger one of low rank; either the other way where that is smaller."""
        (a, b), (c, d) = _split(rows, params.decompose_factor), _split(columns, params.decompose_factor)
        low_first = params.decompose_both and params.r < max(a, c) / 2
        first = params.r * (a + c) if low_first else a * c
        return first + (params.r * (b + d) if params.r < max(b, d) / 2 else b * d)


def _split(size: int, factor: int) -> tuple[int, int]:
    """``size`` as a product: ``factor`` first where it divides, else at most that and the square root."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = min(factor, isqrt(size)) if factor > 0 else isqrt(size)
    first = next(number for number in range(most, 0, -1) if size % number == 0)
    return first, size // first
