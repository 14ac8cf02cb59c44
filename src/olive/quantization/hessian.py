"""Second moments of a layer's inputs: what an error in its weights costs at its output.

For a linear layer y = W x the squared error that a change D of its weights makes over tokens x is
tr(D H D^T) with H = sum of x x^T (LeCun et al. 1990; Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch

_STRIPS = 4


class Moments:
    """Sum of x x^T over tokens, in float32; shared by all layers that read the same input.

    Args:
        width: inputs of the layer.
        device: where to add up.

    Attributes:
        tokens: how many were added.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._upper = torch.zeros(width, width, device=device)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (..., width) of any floating dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        width = flat.shape[1]
        step = -(-width // _STRIPS)
        for first in range(0, width, step):  # what lies below the diagonal is what lies above it
            self._upper[first : first + step, first:].addmm_(flat[:, first : first + step].T, flat[:, first:])
        self.tokens += flat.shape[0]

    @property
    def sums(self) -> torch.Tensor:
        """Sum of x x^T, float32 (width, width)."""
        return self._upper.triu() + self._upper.triu(1).T

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square of each input, float32 (width,)."""
        return self._upper.diagonal() / max(self.tokens, 1)

    @property
    def sound(self) -> bool:
        """Whether the sums are finite and not all zero."""
        extremes = torch.stack(self._upper.aminmax())
        return bool(extremes.isfinite().all()) and bool((self._upper.diagonal() > 0).any())


def inverse_factor(
    sums: torch.Tensor, damping: float, attempts: int = 6
) -> tuple[torch.Tensor, float] | None:
    """Upper Cholesky factor U of the inverse of a damped matrix: inverse = U^T U.

    With the rows and columns in reverse order, the lower factor of H becomes an upper one, and its inverse is
    the U sought: one factorisation and one triangular solve.

    Args:
        sums: symmetric, positive semi-definite (n, n) float32.
        damping: share of the mean of the diagonal that is added to it; ten times as much at each new attempt.
        attempts: how often.

    Returns:
        U and the damping it took; None where no attempt succeeded.
    """
    mean = float(sums.diagonal().mean())
    identity = torch.eye(sums.shape[0], device=sums.device)
    for _ in range(attempts):
        damped = sums.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.stack(upper.aminmax()).isfinite().all()):
                return upper.contiguous(), damping
        damping = max(damping, 1e-4) * 10
    return None


def ridge(sums: torch.Tensor, drift: torch.Tensor, damping: float) -> torch.Tensor:
    """``drift (sums + damping mean(diagonal) I)^-1``.

    With drift = sum of (x' - x) x^T over tokens, W times this is the change of W that brings its outputs on x
    nearest to those of W on x' (ridge regression).
    """
    damped = sums.clone()
    damped.diagonal().add_(damping * float(sums.diagonal().mean()))
    lower = torch.linalg.cholesky(damped)
    return torch.cholesky_solve(drift.T, lower).T
