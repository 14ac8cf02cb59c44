"""Round to nearest, on an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from olive.passes.onnx.weight_only import Bits, Block, Settings, WeightOnly, WeightOnlyParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Grid, Quantised


class OnnxBlockWiseRtnQuantization(WeightOnly["OnnxBlockWiseRtnQuantization.Params"]):
    """Products and embeddings of an ONNX model to integers, each weight to the nearest value of its block."""

    embeddings = True

    class Params(WeightOnlyParams):
        """Settings of every pass that makes MatMulNBits; defaults of Olive 0.13."""

        bits: Bits = Field(4, description="Bits of a weight.")
        block_size: Block = Field(128, description="Weights that share a scale.")
        is_symmetric: bool = Field(True, description="No zero points.")
        nodes_to_include: tuple[str, ...] = Field(
            (), description="Names of the only nodes to quantise; all where empty."
        )

    def settings(self, params: Params, label: str | None = None) -> Settings:
        """The same for every node."""
        return Settings(params.bits, params.block_size, params.is_symmetric)

    def named(self, params: Params) -> dict[str, Iterable[str]]:
        """Nodes to leave, and the only ones to take."""
        return super().named(params) | {"nodes_to_include": params.nodes_to_include}

    def quantise(self, weight: torch.Tensor, grid: Grid, params: Params) -> Quantised:
        """Round some rows."""
        from olive.quantization.grid import round_to_nearest

        return round_to_nearest(weight, grid)
