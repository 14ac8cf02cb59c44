"""GPTQ on searched grids, in order of activation, making up for the drift of earlier layers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from olive.models.quantised import Layer
from olive.passes.quantize.calibrated import Calibrated, Made, Work
from olive.passes.quantize.calibration import CalibrationParams

if TYPE_CHECKING:
    import torch

    from olive.passes.quantize.forward import Group


class Gptq(Calibrated["Gptq.Params"]):
    """Round column by column, the columns to come making up for each error (Frantar et al. 2022).

    Scales and zero points are searched with the inputs' energy as weight and stay fixed; so columns are taken
    in order of that energy without an index of groups at run time. With ``drift`` a layer also aims at the
    outputs of the unchanged model, not only at those on its own inputs (as GPTAQ, Li et al. 2025).
    """

    class Params(CalibrationParams):
        """Settings of every calibrated quantiser, and GPTQ's own."""

        damp_percent: float = Field(
            0.1,
            gt=0,
            le=1,
            validation_alias=AliasChoices("damp_percent", "damping"),
            description="Share of the mean input energy added to each input's own, for a stable inverse.",
        )
        desc_act: bool = Field(
            True, description="Round the columns of most input energy first; costs nothing at run time."
        )
        drift: float = Field(
            0.7,
            ge=0,
            description="How much a layer makes up for what the layers before it went astray; 0 leaves the "
            "unchanged model out, which halves the time.",
        )
        drift_tokens: int | None = Field(
            None,
            ge=1,
            description="Tokens that this is measured on. Default: all of them; fewer take less time, and "
            "make up for less.",
        )
        drift_damp: float = Field(
            0.3,
            gt=0,
            description="As damp_percent, for that correction: larger is more careful with few tokens.",
        )

    def paired(self, params: Params) -> int:
        """The drift is a difference from the unchanged model."""
        return (params.drift_tokens or sys.maxsize) if params.drift > 0 else 0

    def solve(
        self, name: str, weight: torch.Tensor, layer: Layer, group: Group, params: Params, work: Work
    ) -> Made:
        """Quantise one matrix."""
        from olive.quantization.gptq import gptq, refit
        from olive.quantization.k_quant import search

        grid = layer.grid
        solver = _solver(group, params)
        if solver is None:
            why = "its inputs are NaN, infinite or all zero"
            return Made(self.quantise(weight, layer, params), {"fallback": why})
        aim = solver.aim(weight, group)
        energy = group.moments.diagonal
        start = search(aim, grid, energy / energy.mean())
        found = solver.factored(group.moments.sums)
        if found is None:
            why = "no damping made its inputs' moments positive definite"
            return Made(start, {"fallback": why})
        factor, damping = found
        facts: dict[str, Any] = {} if damping == params.damp_percent else {"damping": damping}
        swept = gptq(aim, factor, solver.order, start)
        return Made(refit(aim, swept, group.moments.sums, damping), facts)


class _Solver:
    """What the layers of a group share, each made when first asked for.

    Attributes:
        order: of the columns.
    """

    def __init__(self, group: Group, params: Gptq.Params) -> None:
        import torch

        sums = group.moments.sums
        self.params = params
        self.order = torch.arange(sums.shape[0], device=sums.device)
        if params.desc_act:
            self.order = sums.diagonal().argsort(descending=True, stable=True)
        self._factor: tuple[torch.Tensor, float] | None = None
        self._factored = False
        self._shift: torch.Tensor | None = None

    def aim(self, weight: torch.Tensor, group: Group) -> torch.Tensor:
        """The weights to round: with the drift, those whose outputs come nearest to the unchanged model's.

        A last layer with fewer rows than columns is solved for itself, and the drift let go of before: the
        moments of the widest inputs are the largest matrices there are.
        """
        from olive.quantization.hessian import ridge, ridge_factor

        if group.drift is None or not _finite(group.drift):
            return weight
        sums = group.moments.sums
        share = self.params.drift * group.moments.tokens / group.drift_tokens
        if self._shift is None and group.waiting == 1 and weight.shape[0] <= weight.shape[1]:
            product, group.drift = weight @ group.drift, None
            return weight + share * ridge(product, ridge_factor(sums, self.params.drift_damp))
        if self._shift is None:
            self._shift = ridge(group.drift, ridge_factor(sums, self.params.drift_damp))
        return weight + share * (weight @ self._shift)

    def factored(self, sums: torch.Tensor) -> tuple[torch.Tensor, float] | None:
        """What later columns take over of the errors of earlier ones, and the damping that took."""
        from olive.quantization.hessian import feedback

        if not self._factored:
            self._factored = True
            self._factor = feedback(sums, self.order, self.params.damp_percent)
        return self._factor


def _finite(matrix: torch.Tensor) -> bool:
    import torch

    return bool(torch.stack(matrix.aminmax()).isfinite().all())


def _solver(group: Group, params: Gptq.Params) -> _Solver | None:
    if group.solved is None and group.moments.sound:
        group.solved = _Solver(group, params)
    return group.solved
