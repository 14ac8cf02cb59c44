"""The search and GPTQ: against exhaustive search, float64, and each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from olive.quantization.awq import best_scale, quantise_scaled
from olive.quantization.errors import output_error, weight_error
from olive.quantization.gptq import gptq, refit
from olive.quantization.grid import Grid, Quantised, round_to_nearest
from olive.quantization.hessian import Moments, feedback, ridge, ridge_factor
from olive.quantization.hqq import hqq, lp_error
from olive.quantization.k_quant import magnitudes, search


def weights(rows: int = 64, columns: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def inputs(tokens: int = 600, columns: int = 256, seed: int = 1) -> torch.Tensor:
    """Correlated, with a few inputs of far more energy, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * columns**-0.5 + torch.eye(columns)
    made = torch.randn(tokens, columns, generator=generator) @ mixing
    made[:, ::37] *= 8
    return made


@pytest.mark.parametrize("kind", ["asymmetric", "full_range", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_is_never_worse_than_rounding(bits: int, kind: str) -> None:
    weight = weights()
    weight[0, :32] = 0
    weight[1, :32] = 0.25
    grid = Grid(bits, 32, kind)
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2)) + 0.01
    for shares in (None, importance):
        found, plain = search(weight, grid, shares), round_to_nearest(weight, grid)
        w = torch.ones(256) if shares is None else shares
        errors = [
            ((one.dequantise() - weight).square() * w).view(64, -1, 32).sum(-1) for one in (found, plain)
        ]
        # candidates are compared by differences of sums in float32, whose resolution 8 bits come close to
        assert bool((errors[0] <= errors[1] * (1.02 if bits == 8 else 1 + 1e-5) + 1e-12).all())
    assert found.dequantise()[0, :32].abs().max() == 0


def test_the_search_is_near_the_best_there_is() -> None:
    """Within 4 % of the best of 400 scales and all zero points, each fitted; below onnxruntime's error."""
    weight = weights(rows=24, columns=64)
    grid = Grid(4, 32)
    blocks = weight.view(-1, 32).double()
    best = torch.full((blocks.shape[0],), torch.inf, dtype=torch.float64)
    spread = (blocks.amax(1) - blocks.amin(1))[:, None]
    for factor, zero in itertools.product(np.linspace(0.5, 1.2, 400), range(16)):
        scale = spread * factor / 15
        codes = (blocks / scale).round().clamp(-zero, 15 - zero)
        fitted = (blocks * codes).sum(1) / codes.square().sum(1)
        best = torch.minimum(best, (blocks - codes * fitted[:, None]).square().sum(1))
    ours = (search(weight, grid).dequantise() - weight).square().sum()
    codes, scale, zero = quant_tensor_k_quant_cpu(weight.numpy(), 4, 32)
    theirs = ((codes - zero) * scale).reshape(weight.shape)
    assert float(ours) <= 1.04 * float(best.sum())
    assert float(ours) < float(((theirs - weight.numpy()) ** 2).sum())


def test_magnitudes_are_those_of_llama_cpp() -> None:
    weight = weights(rows=2, columns=64)
    block = weight[1, 32:]
    wanted = block.abs() + block.square().mean().sqrt()
    assert torch.allclose(magnitudes(weight, Grid())[1, 32:], wanted, rtol=1e-6)


def test_the_search_does_not_depend_on_how_rows_are_divided() -> None:
    weight = weights(rows=3000)
    whole = search(weight, Grid())
    for rows in (slice(0, 5), slice(2000, 2100)):
        part = search(weight[rows], Grid())
        assert torch.equal(part.codes, whole.codes[rows])
        assert torch.allclose(part.scales, whole.scales[rows], rtol=1e-6, atol=0)  # order of a sum


def test_moments_are_sums_of_products() -> None:
    x = inputs()
    moments = Moments(256)
    for part in x.split(97):
        moments.add(part)
    wanted = x.double().T @ x.double()
    assert float((moments.sums - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert torch.equal(moments.sums, moments.sums.T)
    assert moments.tokens == 600
    assert moments.sound
    moments.add(torch.full((1, 256), torch.nan))
    assert not moments.sound


def test_the_factor_is_that_of_the_damped_moments() -> None:
    """A D A^T is the matrix, with A unit upper triangular and D positive."""
    moments = Moments(256)
    moments.add(inputs())
    order = moments.diagonal.argsort(descending=True)
    factor, damping = feedback(moments.sums, order, 0.01)
    damped = moments.sums.double() + 0.01 * moments.sums.diagonal().mean() * torch.eye(256)
    damped = damped[order][:, order]
    assert damping == 0.01
    assert bool((factor.diagonal() == 1).all())
    assert not bool(factor.tril(-1).any())
    wide = factor.double()
    inverse = torch.linalg.inv(wide)
    scales = (inverse @ damped @ inverse.T).diagonal()
    assert bool((scales > 0).all())
    assert float((wide * scales @ wide.T - damped).abs().max()) <= 1e-4 * float(damped.abs().max())


def test_damping_grows_until_the_factor_exists() -> None:
    order = torch.arange(16)
    indefinite = torch.diag(torch.tensor([1.0] * 15 + [-0.5]))
    factor, damping = feedback(indefinite, order, 0.01)
    assert damping > 0.5
    assert bool(factor.isfinite().all())
    assert feedback(torch.diag(torch.tensor([1.0, -1.0])), order[:2], 0.01) is None


def plain_gptq(
    weight: torch.Tensor, sums: torch.Tensor, start: Quantised, order: torch.Tensor
) -> torch.Tensor:
    """GPTQ as the paper states it: float64, the inverse updated after each column."""
    left, grid = weight.double().clone(), start.grid
    inverse = torch.linalg.inv(sums.double())
    rest, made = list(order.tolist()), torch.zeros_like(left)
    while rest:
        j = rest.pop(0)
        scale = start.scales[:, j // grid.block].double()
        zero = start.zeros[:, j // grid.block].double()
        code = (left[:, j] / scale + zero).round().clamp(0, grid.top)
        made[:, j] = (code - zero) * scale
        error = (left[:, j] - made[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j][None]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return made


@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_is_the_papers(ordered: bool) -> None:
    weight, moments = weights(rows=16, columns=96), Moments(96)
    moments.add(inputs(columns=96))
    damped = moments.sums.clone()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    order = moments.diagonal.argsort(descending=True) if ordered else torch.arange(96)
    factor, _ = feedback(moments.sums, order, 0.01)
    start = search(weight, Grid(4, 32))
    ours = gptq(weight, factor, order, start).dequantise()
    wanted = plain_gptq(weight, damped, start, order)
    # a value next to the middle of two codes may fall to the other side in float32
    assert float(((ours - wanted).abs() > 1e-6).float().mean()) <= 0.005


def test_each_step_takes_error_off_the_output() -> None:
    weight, moments = weights(), Moments(256)
    moments.add(inputs())
    sums, energy = moments.sums, moments.diagonal
    order = energy.argsort(descending=True)
    factor, damping = feedback(sums, order, 0.01)
    damped = sums.clone()
    damped.diagonal().add_(damping * sums.diagonal().mean())
    plain = round_to_nearest(weight, Grid())
    start = search(weight, Grid(), energy / energy.mean())
    swept = gptq(weight, factor, order, start)
    fitted = refit(weight, swept, sums, damping)
    errors = [output_error(weight, one.dequantise(), damped) for one in (plain, start, swept, fitted)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]
    assert weight_error(weight, swept.dequantise()) > weight_error(weight, start.dequantise())


def test_refit_finds_the_minimum_of_a_lone_scale() -> None:
    """With one block a row the step is the whole solution: least squares in float64."""
    weight, x = weights(rows=8, columns=32), inputs(columns=32)
    sums = (x.double().T @ x.double()).float()
    start = round_to_nearest(weight, Grid(4, 32))
    fitted = refit(weight, start, sums)
    codes = start.codes.double() - start.zeros.double()
    for row in range(8):
        basis, target = x.double() @ codes[row], x.double() @ weight[row].double()
        assert float(fitted.scales[row, 0]) == pytest.approx(
            float(basis @ target / (basis @ basis)), rel=1e-4
        )


def test_ridge_is_the_regression_it_says() -> None:
    now, before = inputs(columns=32), inputs(columns=32, seed=3)
    drift, sums = (before - now).T @ now, now.T @ now
    shift = ridge(drift, ridge_factor(sums, 0.1))
    damped = sums.double() + 0.1 * sums.double().diagonal().mean() * torch.eye(32)
    wanted = drift.double() @ torch.linalg.inv(damped)
    assert float((shift - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_errors_are_shares() -> None:
    weight, x = weights(rows=8, columns=32), inputs(columns=32)
    half = weight * 0.5
    assert weight_error(weight, half) == pytest.approx(0.25, rel=1e-6)
    assert output_error(weight, half, x.T @ x) == pytest.approx(0.25, rel=1e-4)
    assert weight_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0


def test_the_lp_norm_falls_below_that_of_the_squared_search() -> None:
    """With heavy tails, on which the norms differ; block by block, since each keeps the best it had."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 256, generator=generator) * 0.02
    weight *= 1 + 6 * (torch.rand(64, 256, generator=generator) > 0.97)
    for kind in ("asymmetric", "full_range"):
        grid = Grid(4, 32, kind)
        ours, plain = hqq(weight, grid, p=0.7), search(weight, grid)
        errors = lp_error(weight, ours, 0.7), lp_error(weight, plain, 0.7)
        assert bool((errors[0] <= errors[1]).all())
        assert float(errors[0].sum()) < 0.99 * float(errors[1].sum())


def test_awq_takes_error_off_the_output() -> None:
    weight, moments = weights(), Moments(256)
    moments.add(inputs())
    sums, energy = moments.sums, moments.diagonal
    scale, ratio = best_scale([weight], [Grid()], sums, energy, steps=10)
    made = quantise_scaled(weight, scale, energy, Grid(), None).dequantise() / scale
    plain = search(weight, Grid(), energy / energy.mean()).dequantise()
    assert ratio > 0
    assert float((scale.max() * scale.min()).sqrt()) == pytest.approx(1, rel=1e-4)
    assert output_error(weight, made, sums) < output_error(weight, plain, sums)
