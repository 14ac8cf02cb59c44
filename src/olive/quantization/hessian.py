"""Second moments of a layer's inputs: what an error in its weights costs at its output.

For a linear layer y = W x the squared error that a change D of its weights makes over tokens x is
tr(D H D^T) with H = sum of x x^T (LeCun et al. 1990; Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

import torch

_STRIPS, _WIDE = 4, 1024  # strips of a matrix, and rows of one at most


class Moments:
    """Sum of x x^T over tokens, in float32; shared by all layers that read the same input.

    Args:
        width: inputs of the layer.
        device: where to add up.

    Attributes:
        tokens: how many were added.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(width, width, device=device)
        self._step = min(-(-width // _STRIPS), _WIDE)
        self._whole = True
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs (..., width) of any floating dtype."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        for first in range(0, flat.shape[1], self._step):  # what lies below the diagonal lies above it too
            strip = slice(first, first + self._step)
            add_product(self._sums[strip, first:], flat[:, strip], flat[:, first:])
        self.tokens += flat.shape[0]
        self._whole = False

    @property
    def sums(self) -> torch.Tensor:
        """Sum of x x^T, float32 (width, width): the matrix itself, not to be changed."""
        for first in () if self._whole else range(0, len(self._sums), self._step):
            end = first + self._step
            corner = self._sums[first:end, first:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self._sums[end:, first:end] = self._sums[first:end, end:].T
        self._whole = True
        return self._sums

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean square of each input, float32 (width,)."""
        return self._sums.diagonal() / max(self.tokens, 1)

    @property
    def sound(self) -> bool:
        """Whether the sums are finite and not all zero."""
        extremes = torch.stack(self._sums.aminmax())
        return bool(extremes.isfinite().all()) and bool((self._sums.diagonal() > 0).any())


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left^T right`` in float32; a GPU takes 16-bit factors as they are.

    Args:
        total: float32 (m, n); rows may lie apart.
        left: (tokens, m).
        right: (tokens, n), of the same dtype.
    """
    if total.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        torch.ops.aten.addmm.dtype_out(total, left.T, right, torch.float32, out=total)
    else:
        total.addmm_(left.float().T, right.float())


def feedback(
    sums: torch.Tensor, order: torch.Tensor, damping: float, attempts: int = 6
) -> tuple[torch.Tensor, float] | None:
    """Unit upper triangular A of a damped matrix H, rows and columns in ``order``: H = A D A^T.

    With a column k rounded after columns j < k, whose errors are e_j, the least error at the output is left
    where column k is rounded at ``w_k + sum_j e_j A[j, k]`` (Chee et al. 2023, arXiv:2307.13304: what GPTQ
    computes with the inverse of H). A comes from the Cholesky factor of H in reverse order: no inverse.

    Args:
        sums: symmetric, positive semi-definite (n, n) float32.
        order: int64 (n,).
        damping: share of the mean of the diagonal that is added to it; ten times as much at each new attempt.
        attempts: how often.

    Returns:
        A and the damping it took; None where no attempt succeeded.
    """
    mean = float(sums.diagonal().mean())
    reverse = order.flip(0)
    for _ in range(attempts):
        damped = sums[reverse][:, reverse]
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            lower /= lower.diagonal().clone()
            if bool(torch.stack(lower.aminmax()).isfinite().all()):
                return lower.flip(0, 1), damping
        damping = max(damping, 1e-4) * 10
    return None


def ridge_factor(sums: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor of ``sums + damping mean(diagonal) I``."""
    damped = sums.clone()
    damped.diagonal().add_(damping * float(sums.diagonal().mean()))
    return torch.linalg.cholesky(damped)


def ridge(right: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """``right (L L^T)^-1``, (rows, n).

    With drift = sum of (x' - x) x^T over tokens and L of ``ridge_factor``, ``ridge(W drift, L)`` is the
    change of W that brings its outputs on x nearest to those of W on x' (ridge regression).
    """
    return torch.cholesky_solve(right.T, lower).T
