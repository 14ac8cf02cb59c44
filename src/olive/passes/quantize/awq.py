"""AWQ: columns scaled by the energy of their inputs, the scale folded into what comes before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from olive.config.workflow import Accelerator
from olive.errors import Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import ModelInfo
from olive.models.quantised import Layer
from olive.passes.quantize.calibrated import Calibrated, Made, Work
from olive.passes.quantize.calibration import CalibrationParams
from olive.passes.quantize.quantiser import read_weight

if TYPE_CHECKING:
    import torch

    from olive.passes.quantize.forward import Group

# Norms of these are a plain product with their weight, and their feed-forward layers are act(gate) * up.
_KNOWN = ("llama", "mistral", "phi3", "qwen2", "qwen3", "granite", "smollm3")
_ATTENTION, _GATED = ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj")


class Awq(Calibrated["Awq.Params"]):
    """Scale the columns that matter before rounding (Lin et al. 2023), with searched grids.

    The scale goes into the norm before attention and feed-forward, and for the last product into the rows of
    the one before it; the model is the same function but for rounding.
    """

    class Params(CalibrationParams):
        """Settings of every calibrated quantiser, and the search's."""

        n_grid: int = Field(20, ge=1, description="Exponents tried for the scale; 1 leaves weights unscaled.")

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As every calibrated quantiser; where the scale can go must be known."""
        yield from super().check(model, params, machine, accelerator)
        kind = str(model.config.get("model_type", ""))
        if kind not in _KNOWN:
            yield Problem(
                f"where the layers of {kind or 'this model'} take a scale is not known here: grids are "
                "searched, and weights stay unscaled",
                severity=Severity.WARNING,
                fix="Use Gptq.",
            )

    def solve(
        self, name: str, weight: torch.Tensor, layer: Layer, group: Group, params: Params, work: Work
    ) -> Made:
        """Quantise one matrix."""
        from olive.quantization.awq import quantise_scaled

        if not group.moments.sound:
            why = "its inputs are NaN, infinite or all zero"
            return Made(self.quantise(weight, layer, params), {"fallback": why})
        energy = group.moments.diagonal
        if group.solved is None:
            group.solved = self._scale(name, group, params, work)
        scale, ratio = group.solved
        one = quantise_scaled(weight, scale, energy, layer.grid, None)
        return Made(one, {"ratio": ratio}, one.dequantise() / scale)

    def _scale(self, name: str, group: Group, params: Params, work: Work) -> tuple[torch.Tensor, float]:
        """The scale of a group's columns, folded into what comes before it."""
        import torch

        from olive.quantization.awq import best_scale

        energy = group.moments.diagonal
        prefix, _, last = name.rpartition(".")
        layer = prefix.rpartition(".")[0]
        unscaled = torch.ones_like(energy), 0.0
        if work.model_type not in _KNOWN:
            return unscaled
        if last == "down_proj":
            names = [name]
        else:
            family = next((family for family in (_ATTENTION, _GATED) if last in family), ())
            names = [other for part in family if (other := f"{prefix}.{part}") in work.chosen]
            stored = [part for part in family if f"{prefix}.{part}.weight" in work.tensors]
            if not names or len(names) < len(stored):  # one that stays as it is would read scaled inputs
                return unscaled
        weights = [read_weight(work.tensors, other, work.device) for other in names]
        grids = [work.chosen[other].grid for other in names]
        scale, ratio = best_scale(weights, grids, group.moments.sums, energy, params.n_grid)
        folded = (
            self._into_rows(prefix, scale, work)
            if last == "down_proj"
            else self._into_norm(layer, last, scale, work)
        )
        return (scale, ratio) if folded else unscaled

    def _into_norm(self, layer: str, last: str, scale: torch.Tensor, work: Work) -> bool:
        """Divide the weight of the norm before by ``scale``."""
        names = ("input_layernorm",) if last in _ATTENTION else ("post_attention_layernorm",)
        for norm in names:
            key = f"{layer}.{norm}.weight"
            if key in work.tensors:
                work.replaced[key] = work.tensors[key].float().to(scale.device) / scale
                return True
        return False

    def _into_rows(self, prefix: str, scale: torch.Tensor, work: Work) -> bool:
        """Divide the rows of ``up`` by ``scale``: its codes stay, their scales take it."""
        for last in ("up_proj", "gate_up_proj"):
            if (made := work.made.get(f"{prefix}.{last}")) is not None:
                layer, one = made
                scales = one.scales.clone()
                scales[-len(scale) :] /= scale[:, None]
                work.made[f"{prefix}.{last}"] = layer, replace(one, scales=scales)
                return True
        return False
