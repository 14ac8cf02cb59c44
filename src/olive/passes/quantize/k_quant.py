"""Scale and zero point searched together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from olive.models.quantised import Layer
from olive.passes.quantize.quantiser import Quantiser
from olive.passes.quantize.targets import QuantizeParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Quantised


class KQuant(Quantiser["KQuant.Params"]):
    """The scale and zero point of least squared error in each block: no data, the size of Rtn."""

    class Params(QuantizeParams):
        """Settings of every quantiser, and the weight of an error."""

        importance: Literal["magnitude", "equal"] = Field(
            "magnitude",
            description="What an error counts: more where the weight is large, or the same everywhere.",
        )

    def quantise(self, weight: torch.Tensor, layer: Layer, params: Params) -> Quantised:
        """Quantise one matrix."""
        from olive.quantization.k_quant import magnitudes, search

        grid = layer.grid
        shares = magnitudes(weight, grid) if params.importance == "magnitude" else None
        return search(weight, grid, shares)
