"""HQQ on integer zero points, on an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from olive.passes.onnx.weight_only import Bits, Block, Settings, WeightOnly, WeightOnlyParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Grid, Quantised


class OnnxHqqQuantization(WeightOnly["OnnxHqqQuantization.Params"]):
    """Products of an ONNX model to integers, the grid of each block by least lp error, p below 1."""

    class Params(WeightOnlyParams):
        """Settings of every pass that makes MatMulNBits; defaults of Olive 0.13."""

        bits: Bits = Field(4, description="Bits of a weight.")
        block_size: Block = Field(128, description="Weights that share a scale.")
        lp_norm: float = Field(0.7, gt=0, le=2, description="p of the error's norm.")
        iterations: int = Field(4, ge=1, description="Rounds of reweighting.")
        nodes_to_include: tuple[str, ...] = Field(
            (), description="Names of the only nodes to quantise; all where empty."
        )

    def settings(self, params: Params, label: str | None = None) -> Settings:
        """The same for every node, with zero points."""
        return Settings(params.bits, params.block_size, symmetric=False)

    def named(self, params: Params) -> dict[str, Iterable[str]]:
        """Nodes to leave, and the only ones to take."""
        return super().named(params) | {"nodes_to_include": params.nodes_to_include}

    def quantise(self, weight: torch.Tensor, grid: Grid, params: Params) -> Quantised:
        """Search the grids of some rows."""
        from olive.quantization.hqq import hqq

        return hqq(weight, grid, params.lp_norm, params.iterations)
