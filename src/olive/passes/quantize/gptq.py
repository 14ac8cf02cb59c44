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
        aim = weight if solver.shift is None else weight + params.drift * (weight @ solver.shift)
        energy = group.moments.diagonal
        start = search(aim, grid, energy / energy.mean())
        facts: dict[str, Any] = {} if solver.damping == params.damp_percent else {"damping": solver.damping}
        swept = gptq(aim, solver.factor, solver.order, start)
        return Made(refit(aim, swept, solver.damped), facts)


class _Solver:
    """What all layers of a group share.

    Attributes:
        order: of the columns.
        factor: upper factor of the inverse of the damped moments, in that order.
        damping: that it took.
        damped: the moments, damped, in the order of the layer.
        shift: (width, width): weight @ shift is the change that makes up for the whole drift; None without.
    """

    def __init__(
        self,
        order: torch.Tensor,
        factor: torch.Tensor,
        damping: float,
        damped: torch.Tensor,
        shift: torch.Tensor | None,
    ) -> None:
        self.order, self.factor, self.damping, self.damped, self.shift = order, factor, damping, damped, shift


def _solver(group: Group, params: Gptq.Params) -> _Solver | None:
    import torch

    from olive.quantization.hessian import inverse_factor, ridge

    if group.solved is not None:
        return group.solved
    if not group.moments.sound:
        return None
    sums = group.moments.sums
    width = sums.shape[0]
    order = torch.arange(width, device=sums.device)
    if params.desc_act:
        order = sums.diagonal().argsort(descending=True, stable=True)
    found = inverse_factor(sums[order][:, order], params.damp_percent)
    if found is None:
        return None
    factor, damping = found
    shift = None
    if group.drift is not None and bool(torch.stack(group.drift.aminmax()).isfinite().all()):
        shift = ridge(sums, group.drift, params.drift_damp)
    damped = sums.clone()
    damped.diagonal().add_(damping * sums.diagonal().mean())
    group.solved = _Solver(order, factor, damping, damped, shift)
    return group.solved
