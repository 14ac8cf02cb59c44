"""Orthogonal matrices that spread outliers over all coordinates: Hadamard, random, and steps along the group.

With ``H`` a Hadamard matrix of order n (entries 1 and -1, ``H H^T = n I``), ``H / sqrt(n)`` is orthogonal and
every row of it has equal magnitudes. Orders: Sylvester's for powers of two, Paley's (1933) two families for
``q + 1`` and ``2 (q + 1)`` with a prime ``q``, and Kronecker products of these. Random signs before it as in
QuaRot (Ashkboos et al. 2024, arXiv:2404.00456). Imported only where torch already is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, sqrt

import torch


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix ``diag(signs) (factor x S / sqrt(power))``: a Kronecker product, S Sylvester's.

    Attributes:
        factor: orthogonal float64 (m, m).
        power: order of S, a power of two; 1 for a matrix that is ``factor`` alone.
        signs: float64 (m * power,) of 1 and -1; None for none.
    """

    factor: torch.Tensor
    power: int = 1
    signs: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Its order."""
        return len(self.factor) * self.power

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ R``, in the dtype of ``rows``; several matrices side by side where rows are longer.

        Args:
            rows: floating point (..., k * size): each run of ``size`` entries is rotated by itself.
        """
        shape = rows.shape
        value = rows.reshape(-1, self.size)
        if self.signs is not None:
            value = value * self.signs.to(value)
        factor = self.factor.to(value)
        if self.power == 1:
            return (value @ factor).reshape(shape)
        value = walsh_hadamard(value.view(-1, len(factor), self.power))
        if len(factor) > 1:
            value = factor.T @ value
        return value.reshape(shape)

    def matrix(self) -> torch.Tensor:
        """R, float64 (size, size)."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))


def walsh_hadamard(value: torch.Tensor) -> torch.Tensor:
    """``value @ S / sqrt(n)`` along the last axis, whose length n is a power of two, in n log n steps."""
    length = value.shape[-1]
    if length & (length - 1):
        raise ValueError(f"{length} is no power of two")
    made, half = value / sqrt(length), 1
    while half < length:
        pairs = made.view(*made.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        made = torch.stack((first + second, first - second), -2).view(value.shape)
        half *= 2
    return made


def hadamard(order: int) -> torch.Tensor | None:
    """A Hadamard matrix, float64 (order, order) of 1 and -1; None where no construction here gives one."""
    if order & (order - 1) == 0:
        sylvester = torch.ones(1, 1, dtype=torch.float64)
        while len(sylvester) < order:
            sylvester = torch.kron(_TWO, sylvester)
        return sylvester
    if order % 4 == 0 and _prime(order - 1):
        return _conference(order - 1) + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _prime(half - 1):
        eye = torch.eye(half, dtype=torch.float64)
        return torch.kron(_conference(half - 1), _TWO) + torch.kron(eye, _TWO @ _SWAP)
    return None


def random_hadamard(size: int, generator: torch.Generator) -> Rotation | None:
    """A Hadamard matrix with random signs on its inputs; None where none of that order is known here."""
    small = size & ~(size - 1)  # the largest power of two that divides it
    odd = size // small
    order = odd
    while order <= size:
        if odd == 1 or order > 1:
            found = hadamard(order)
            if found is not None:
                signs = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1.0
                return Rotation(found / sqrt(order), size // order, signs)
        order *= 2
    return None


def random_orthogonal(size: int, generator: torch.Generator) -> Rotation:
    """Uniformly distributed (Haar): Q of a QR decomposition of normal numbers, signs as R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return Rotation(q * r.diagonal().sign())


def cayley(skew: torch.Tensor) -> torch.Tensor:
    """``(I + A / 2)^-1 (I - A / 2)``: orthogonal, and a step against A for small A (Li et al. 2020).

    Args:
        skew: A, skew-symmetric float64 (..., n, n).
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return torch.linalg.solve(eye + skew / 2, eye - skew / 2)


def largest_angle(skew: torch.Tensor, rounds: int = 30) -> torch.Tensor:
    """Spectral norm of skew-symmetric matrices (..., n, n), from below, by the power method."""
    draw = torch.Generator().manual_seed(0)
    value = torch.randn(skew.shape[-1], 1, dtype=skew.dtype, generator=draw).to(skew.device)
    value = value.expand(*skew.shape[:-1], 1)
    for _ in range(rounds):
        value = skew @ value
        norm = torch.linalg.vector_norm(value, dim=(-2, -1))
        value = value / norm.clamp(min=1e-300)[..., None, None]
    return norm


_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
_SWAP = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


def _conference(q: int) -> torch.Tensor:
    """Paley's matrix C of order q + 1 for a prime q: zero diagonal, 1 and -1 elsewhere, ``C C^T = q I``.

    It is symmetric for q = 1 and skew for q = 3 modulo 4.
    """
    squares = {number * number % q for number in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, q)])
    places = torch.arange(q)
    made = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    made[1:, 1:] = character[(places[:, None] - places[None]) % q]
    made[0, 1:] = 1.0
    made[1:, 0] = 1.0 if q % 4 == 1 else -1.0
    return made


def _prime(number: int) -> bool:
    return number > 2 and all(number % divisor for divisor in range(2, isqrt(number) + 1))
