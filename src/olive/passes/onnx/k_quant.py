"""Scale and zero point searched together, on an ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import Field

from olive.config.base import Frozen
from olive.passes.onnx.weight_only import Bits, Block, Settings, WeightOnly, WeightOnlyParams

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Grid, Quantised


class NodeSettings(Frozen):
    """Other settings for one node."""

    bits: Bits | None = Field(None, description="Bits of a weight.")
    group_size: Block | None = Field(None, description="Weights that share a scale.")


class OnnxKQuantQuantization(WeightOnly["OnnxKQuantQuantization.Params"]):
    """Products of an ONNX model to integers, scale and zero point of each block by least squared error."""

    class Params(WeightOnlyParams):
        """Settings of every pass that makes MatMulNBits, and of single nodes; defaults of Olive 0.13."""

        bits: Bits = Field(4, description="Bits of a weight.")
        block_size: Block = Field(32, description="Weights that share a scale.")
        customized_weight_config: dict[str, NodeSettings] = Field(
            {}, description="Name of a node to other bits or group_size."
        )

    def settings(self, params: Params, label: str | None = None) -> Settings:
        """What holds for all nodes, and in its place what is said of the node."""
        own = params.customized_weight_config.get(label or "", NodeSettings(bits=None, group_size=None))
        return Settings(own.bits or params.bits, own.group_size or params.block_size, symmetric=False)

    def all_settings(self, params: Params) -> Iterable[Settings]:
        """Those of single nodes too."""
        yield self.settings(params)
        yield from (self.settings(params, label) for label in params.customized_weight_config)

    def named(self, params: Params) -> dict[str, Iterable[str]]:
        """Nodes to leave, and those with settings of their own."""
        return super().named(params) | {"customized_weight_config": params.customized_weight_config}

    def quantise(self, weight: torch.Tensor, grid: Grid, params: Params) -> Quantised:
        """Search the grids of some rows."""
        from olive.quantization.k_quant import magnitudes, search

        return search(weight, grid, magnitudes(weight, grid))
