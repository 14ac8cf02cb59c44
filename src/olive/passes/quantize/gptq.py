"""GPTQ on searched grids, in order of activation, making up for the drift of earlier layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, Field

from olive.models.quantised import Layer
from olive.passes.quantize.calibrated import Calibrated, Made, Work
from olive.passes.quantize.calibration import CalibrationParams

if TYPE_CHECKING:
    import torch

    from olive.passes.quantize.layers import Group


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
        drift_damp: float = Field(
            0.3,
            gt=0,
            description="As damp_percent, for that correction: larger is more careful with few tokens.",
        )

    def paired(self, params: Params) -> bool:
        """The drift is a difference from the unchanged model."""
        return params.drift > 0

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
        aim = solver.aim(weight, group, params)
        energy = group.moments.diagonal
        start = search(aim, grid, energy / energy.mean())
        if solver.factor is None:
            why = "no damping made its inputs' moments positive definite"
            return Made(start, {"fallback": why})
        facts: dict[str, Any] = {} if solver.damping == params.damp_percent else {"damping": solver.damping}
        swept = gptq(aim, solver.factor, solver.order, start)
        return Made(refit(aim, swept, group.moments.sums, solver.damping), facts)


class _Solver:
    """What the layers of a group share, made when first asked for.

    Attributes:
        order: of the columns.
        factor: what later columns take over of the errors of earlier ones, in that order; None where it does
            not exist.
        damping: that it took.
    """

    def __init__(self, sums: torch.Tensor, params: Gptq.Params) -> None:
        import torch

        self.order = torch.arange(sums.shape[0], device=sums.device)
        if params.desc_act:
            self.order = sums.diagonal().argsort(descending=True, stable=True)
        self.factor: torch.Tensor | None = None
        self.damping = params.damp_percent
        self._shift: torch.Tensor | None = None
        self._tried = False

    def aim(self, weight: torch.Tensor, group: Group, params: Gptq.Params) -> torch.Tensor:
        """The weights to round: with the drift, those whose outputs come nearest to the unchanged model's.

        The largest matrices here are moments of a model's widest inputs; the order of work is the one that
        holds fewest of them at a time.
        """
        from olive.quantization.hessian import feedback, ridge, ridge_factor

        sums, made = group.moments.sums, weight
        if group.drift is not None and _finite(group.drift):
            if self._shift is None and group.waiting == 1 and weight.shape[0] <= weight.shape[1]:
                product, group.drift = weight @ group.drift, None
                made = weight + params.drift * ridge(product, ridge_factor(sums, params.drift_damp))
            else:
                if self._shift is None:
                    self._shift = ridge(group.drift, ridge_factor(sums, params.drift_damp))
                made = weight + params.drift * (weight @ self._shift)
        if not self._tried:
            self._tried = True
            found = feedback(sums, self.order, params.damp_percent)
            if found is not None:
                self.factor, self.damping = found
        return made


def _finite(matrix: torch.Tensor) -> bool:
    import torch

    return bool(torch.stack(matrix.aminmax()).isfinite().all())


def _solver(group: Group, params: Gptq.Params) -> _Solver | None:
    if group.solved is None and group.moments.sound:
        group.solved = _Solver(group.moments.sums, params)
    return group.solved
