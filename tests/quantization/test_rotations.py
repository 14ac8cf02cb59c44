"""Hadamard and orthogonal matrices against SciPy, NumPy and their definition, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from olive.quantization.rotations import (
    Rotation,
    cayley,
    hadamard,
    largest_angle,
    random_hadamard,
    random_orthogonal,
    walsh_hadamard,
)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def off_identity(matrix: torch.Tensor) -> float:
    return float((matrix @ matrix.mT - torch.eye(len(matrix), dtype=matrix.dtype)).abs().max())


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 12, 20, 24, 28, 36, 44, 60, 76, 84])
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(order: int) -> None:
    made = hadamard(order)
    assert made is not None
    assert torch.equal(made.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.float64))  # exact: integers


@pytest.mark.parametrize("order", [3, 6, 18, 22, 52, 92, 100])
def test_orders_that_no_construction_gives(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("length", [1, 2, 64, 256])
def test_the_fast_transform_is_scipys_matrix(length: int) -> None:
    value = torch.randn(7, 3, length, dtype=torch.float64, generator=draw())
    wanted = value.numpy() @ scipy.linalg.hadamard(length).astype(float) / np.sqrt(length)
    np.testing.assert_allclose(walsh_hadamard(value).numpy(), wanted, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="no power of two"):
        walsh_hadamard(torch.zeros(2, 12))


@pytest.mark.parametrize("size", [8, 64, 96, 576, 896, 960, 72])
def test_a_random_hadamard_is_the_kronecker_product_it_says(size: int) -> None:
    made = random_hadamard(size, draw(3))
    assert made is not None
    assert made.signs is not None
    plain = np.kron(made.factor.numpy(), scipy.linalg.hadamard(made.power) / np.sqrt(made.power))
    wanted = made.signs.numpy()[:, None] * plain
    np.testing.assert_allclose(made.matrix().numpy(), wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.abs(wanted), 1 / np.sqrt(size), rtol=1e-12)
    assert off_identity(made.matrix()) < 1e-13
    rows = torch.randn(5, 2 * size, dtype=torch.float64, generator=draw())
    both = torch.cat([rows[:, :size] @ made.matrix(), rows[:, size:] @ made.matrix()], 1)
    torch.testing.assert_close(made.apply(rows), both, rtol=0, atol=1e-12)


def test_no_hadamard_of_an_odd_size_or_of_a_hundred() -> None:
    assert random_hadamard(15, draw()) is None
    assert random_hadamard(100, draw()) is None
    assert random_hadamard(2 * 25, draw()) is None


def test_seeds_decide_signs_and_random_matrices() -> None:
    one, other, again = (random_hadamard(64, draw(seed)) for seed in (1, 2, 1))
    assert one is not None
    assert other is not None
    assert again is not None
    assert torch.equal(one.matrix(), again.matrix())
    assert not torch.equal(one.matrix(), other.matrix())
    assert torch.equal(random_orthogonal(9, draw(1)).factor, random_orthogonal(9, draw(1)).factor)


@pytest.mark.parametrize("size", [1, 9, 50])
def test_a_random_orthogonal_matrix(size: int) -> None:
    made = random_orthogonal(size, draw())
    assert made.size == size
    assert off_identity(made.factor) < 1e-13


def test_cayley_steps_stay_orthogonal_and_go_downhill() -> None:
    """Rotate a matrix onto another: the loss falls to nothing in a few hundred steps."""
    target = random_orthogonal(12, draw(4)).factor
    if torch.linalg.det(target) < 0:  # no path leads to a reflection
        target[:, 0] *= -1
    rotation = torch.eye(12, dtype=torch.float64)
    for _ in range(300):
        direction = rotation.T @ (rotation - target)
        rotation = rotation @ cayley((direction - direction.T) / 2)
    assert off_identity(rotation) < 1e-12
    assert float((rotation - target).abs().max()) < 1e-6


def test_a_step_turns_by_the_angle_of_its_skew_matrix() -> None:
    skew = torch.tensor([[0.0, 0.1], [-0.1, 0.0]], dtype=torch.float64)
    made = cayley(skew)
    angle = 2 * np.arctan(0.05)
    wanted = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(made.numpy(), wanted, rtol=0, atol=1e-14)
    assert float(largest_angle(skew)) == pytest.approx(0.1, rel=1e-12)


def test_the_largest_angle_is_the_spectral_norm() -> None:
    value = torch.randn(3, 24, 24, dtype=torch.float64, generator=draw())
    skew = value - value.mT
    wanted = np.linalg.norm(skew.numpy(), 2, axis=(1, 2))
    np.testing.assert_allclose(largest_angle(skew, 200).numpy(), wanted, rtol=1e-6)
    assert (largest_angle(skew).numpy() > 0.9 * wanted).all()


def test_a_rotation_keeps_dtype_and_length() -> None:
    made = random_hadamard(48, draw())
    assert isinstance(made, Rotation)
    rows = torch.randn(4, 48, generator=draw())
    turned = made.apply(rows)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-6, atol=0)
