"""Learned rounding against the same mathematics in float64, and against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from olive.quantization.grid import Grid, round_to_nearest
from olive.quantization.k_quant import search
from olive.quantization.rounding import LearnedRounding, pull_back

KINDS = ["asymmetric", "full_range", "symmetric"]


def weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))


def disturbed(one: LearnedRounding, seed: int = 1) -> LearnedRounding:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        one.offsets.uniform_(-0.45, 0.45, generator=draw)
        one.factors.uniform_(0.7, 0.95, generator=draw)
    return one


def reference(one: LearnedRounding, w: np.ndarray, grid: Grid) -> tuple[np.ndarray, ...]:
    """Codes, scales and zero points in float64, written from the paper's formulas."""
    blocks = w.astype(np.float64).reshape(len(w), -1, grid.block)
    v, factors = (tensor.detach().double().numpy() for tensor in (one.offsets, one.factors))
    low, high = blocks.min(-1), blocks.max(-1)
    if grid.kind == "asymmetric":
        low, high = np.minimum(low, 0) * factors[0], np.maximum(high, 0) * factors[1]
        scales = (high - low) / grid.top
        zeros = np.clip(np.rint(-low / scales), 0, grid.top)
    else:
        largest = np.where(np.abs(high) > np.abs(low), high, low)
        reach = -grid.middle if grid.kind == "full_range" else grid.middle - 1
        scales = (largest if grid.kind == "full_range" else np.abs(largest)) / reach * factors[0]
        zeros = np.full_like(scales, grid.middle)
    lowest = 1 if grid.kind == "symmetric" else 0
    codes = np.clip(np.rint(blocks / scales[..., None] + v) + zeros[..., None], lowest, grid.top)
    return codes, scales, zeros


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_is_the_published_one(kind: str, bits: int) -> None:
    grid, w = Grid(bits, 32, kind), weight()  # type: ignore[arg-type]
    one = disturbed(LearnedRounding(w, grid))
    codes, scales, zeros = reference(one, w.numpy(), grid)
    made = one.quantised()
    assert np.mean(made.codes.numpy().reshape(codes.shape) != codes) < 0.01  # ties of float32
    np.testing.assert_allclose(made.scales.numpy(), scales, rtol=1e-5)
    if made.zeros is not None:
        assert np.array_equal(made.zeros.numpy(), zeros)
    torch.testing.assert_close(made.dequantise(), one.forward().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_learning_it_is_its_start(kind: str) -> None:
    grid, w = Grid(4, 32, kind), weight(3)  # type: ignore[arg-type]
    plain, found = round_to_nearest(w, grid), search(w, grid)
    for start, wanted in ((None, plain), (found, found)):
        made = LearnedRounding(w, grid, start).quantised()
        torch.testing.assert_close(made.scales, wanted.scales, rtol=1e-5, atol=0)
        assert float((made.codes != wanted.codes).float().mean()) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_surrogate(kind: str) -> None:
    """Every rounding replaced by value + its (constant) residual; central differences in float64."""
    grid, w = Grid(4, 32, kind), weight(5)  # type: ignore[arg-type]
    one = disturbed(LearnedRounding(w, grid))
    weights = torch.randn(w.shape, generator=torch.Generator().manual_seed(9))
    (one.forward() * weights).sum().backward()
    codes, _, _ = reference(one, w.numpy(), grid)
    blocks = w.double().numpy().reshape(6, -1, 32)
    g = weights.double().numpy().reshape(blocks.shape)

    def ends(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        if grid.kind == "asymmetric":
            scales = (high * f[1] - low * f[0]) / grid.top
            return scales, -low * f[0] / scales
        low, high = blocks.min(-1), blocks.max(-1)
        largest = np.where(np.abs(high) > np.abs(low), high, low)
        reach = -grid.middle if grid.kind == "full_range" else grid.middle - 1
        scales = (largest if grid.kind == "full_range" else np.abs(largest)) / reach * f[0]
        return scales, np.full_like(scales, grid.middle)

    f0, v0 = (tensor.detach().double().numpy() for tensor in (one.factors, one.offsets))
    s0, z0 = ends(f0)
    raw0 = blocks / s0[..., None] + v0
    keep_n, keep_z = np.rint(raw0) - raw0, np.rint(z0) - z0
    lowest = 1 if grid.kind == "symmetric" else 0

    def surrogate(f: np.ndarray, v: np.ndarray) -> float:
        scales, zeros = ends(f)
        zeros = (zeros + keep_z)[..., None]
        n = blocks / scales[..., None] + v + keep_n
        inner = np.rint(raw0) + np.rint(z0)[..., None]
        cut = np.where(inner < lowest, lowest, np.where(inner > grid.top, grid.top, n + zeros))
        return float(((cut - zeros) * scales[..., None] * g).sum())

    edge = (codes == lowest) | (codes == grid.top)  # the clamp's own kink
    for at in [(0, 0, 3), (2, 1, 17), (5, 0, 30)]:
        if edge[at]:
            continue
        h = np.zeros_like(v0)
        h[at] = 1e-6
        wanted = (surrogate(f0, v0 + h) - surrogate(f0, v0 - h)) / 2e-6
        assert float(one.offsets.grad[at]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    for at in [(0, 0, 0), (0, 3, 1)]:
        h = np.zeros_like(f0)
        h[at] = 1e-6
        wanted = (surrogate(f0 + h, v0) - surrogate(f0 - h, v0)) / 2e-6
        assert float(one.factors.grad[at]) == pytest.approx(wanted, rel=1e-2, abs=1e-3)


def test_a_step_goes_against_the_sign_and_stays_inside() -> None:
    one = LearnedRounding(weight(), Grid(4, 32))
    one.forward().sum().backward()
    sign = one.offsets.grad.sign()
    one.step(0.125, 0.0)
    assert torch.equal(one.offsets.detach(), -0.125 * sign)
    for _ in range(6):
        one.forward().sum().backward()
        one.step(0.25, 0.25)
    assert float(one.offsets.detach().abs().max()) <= 0.5
    assert 0.5 <= float(one.factors.detach().min()) <= float(one.factors.detach().max()) <= 1.0


def test_a_block_of_zeros_stays_zero() -> None:
    for kind in KINDS:
        one = LearnedRounding(torch.zeros(2, 64), Grid(4, 32, kind))  # type: ignore[arg-type]
        one.forward().square().sum().backward()
        assert bool(one.offsets.grad.isfinite().all())
        assert float(one.quantised().dequantise().abs().max()) == 0.0


def straight_through(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to nearest in the formulas of a grid, with roundings that autograd does not see."""

    def nearest(value: torch.Tensor) -> torch.Tensor:
        return value + (value.round() - value).detach()

    blocks = weight.reshape(len(weight), -1, grid.width(weight.shape[1]))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    zeros: torch.Tensor | float = float(grid.middle)
    if grid.kind == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scales = (high - low) / grid.top
        zeros = nearest(-low / scales)
    elif grid.kind == "full_range":
        scales = torch.where(high.abs() > low.abs(), high, low) / -float(grid.middle)
    else:
        scales = torch.maximum(-low, high) / (grid.middle - 1)
    codes = (nearest(blocks / scales) + zeros).clamp(0, grid.top)
    return ((codes - zeros) * scales).view(weight.shape)


@pytest.mark.parametrize("kind", ["asymmetric", "full_range", "symmetric"])
@pytest.mark.parametrize(("bits", "block"), [(4, 8), (2, 16), (8, -1)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_gradient_of_rounding_is_autograds(kind: Any, bits: int, block: int, shift: float) -> None:
    grid = Grid(bits, block, kind)
    draw = torch.Generator().manual_seed(bits)
    weight = (torch.randn(6, 32, generator=draw) + shift).requires_grad_()
    gradient = torch.randn(6, 32, generator=draw)
    made = straight_through(weight, grid)
    torch.testing.assert_close(
        made, round_to_nearest(weight.detach(), grid).dequantise(), rtol=1e-5, atol=1e-5
    )
    (wanted,) = torch.autograd.grad(made, weight, gradient)
    # sums of a few numbers of size one in float32, in another order
    torch.testing.assert_close(pull_back(weight.detach(), grid, gradient), wanted, rtol=1e-4, atol=1e-5)
