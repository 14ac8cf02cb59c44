"""HQQ on integer zero points."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from olive.models.quantised import Layer
from olive.passes.quantize.quantiser import Quantiser
from olive.passes.quantize.targets import QuantizeParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Quantised


class Hqq(Quantiser["Hqq.Params"]):
    """The grid of least lp error in each block, p below 1 (Badri and Shaji 2023): no data."""

    class Params(QuantizeParams):
        """Settings of every quantiser, and the norm."""

        lp_norm: float = Field(0.7, gt=0, le=2, description="p of the error's norm.")
        iterations: int = Field(4, ge=1, description="Rounds of reweighting.")

    seconds_each = 1.2e-7

    def quantise(self, weight: torch.Tensor, layer: Layer, params: Params) -> Quantised:
        """Quantise one matrix."""
        from olive.quantization.hqq import hqq

        return hqq(weight, layer.grid, params.lp_norm, params.iterations)
