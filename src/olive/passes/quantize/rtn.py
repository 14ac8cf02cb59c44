"""Round to nearest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from olive.models.quantised import Layer
from olive.passes.quantize.quantiser import Quantiser
from olive.passes.quantize.targets import QuantizeParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Quantised


class Rtn(Quantiser["Rtn.Params"]):
    """Every weight to the nearest value of a grid that spans its block: no data, the most error."""

    class Params(QuantizeParams):
        """Settings of every quantiser."""

    def quantise(self, weight: torch.Tensor, layer: Layer, params: Params) -> Quantised:
        """Round one matrix."""
        from olive.quantization.grid import round_to_nearest

        return round_to_nearest(weight, layer.grid)
