"""How far a quantised matrix is from the one it stands for."""

from __future__ import annotations

import torch


def weight_error(weight: torch.Tensor, quantised: torch.Tensor) -> float:
    """Squared error of the weights over their sum of squares; 0 for a matrix of zeros."""
    own = float(weight.float().square().sum())
    return float((quantised.float() - weight.float()).square().sum()) / own if own else 0.0


def output_error(weight: torch.Tensor, quantised: torch.Tensor, sums: torch.Tensor) -> float:
    """Squared error of a layer's outputs over their sum of squares.

    Args:
        weight: (rows, columns).
        quantised: (rows, columns).
        sums: (columns, columns), sum of x x^T over the layer's inputs.
    """
    wide, change = weight.float(), quantised.float() - weight.float()
    own = float((wide @ sums).mul_(wide).sum())
    return float((change @ sums).mul_(change).sum()) / own if own > 0 else 0.0
