"""The GPU's sweep and search against the CPU's; the pass on both. Skipped without CUDA."""

from __future__ import annotations

import pytest
import torch

from olive.quantization.errors import output_error
from olive.quantization.gptq import gptq, refit
from olive.quantization.grid import Grid
from olive.quantization.hessian import Moments, feedback
from olive.quantization.k_quant import search

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def made(rows: int, columns: int, tokens: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) * columns**-0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, ::37] *= 8
    return torch.randn(rows, columns, generator=generator) * 0.02, x


@pytest.mark.parametrize("kind", ["asymmetric", "full_range", "symmetric"])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
@pytest.mark.parametrize("weighted", [0, 1, 2])
def test_the_search_finds_as_good_scales(kind: str, block: int, weighted: int) -> None:
    weight, x = made(200, 1280)
    weight[0, :block] = 0
    weight[1, :block] = 0.25
    shares = x.square().mean(0) if weighted == 1 else weight.abs() + 1e-3 if weighted else None
    grid = Grid(4, block, kind)
    ours = search(weight.cuda(), grid, None if shares is None else shares.cuda())
    wanted = search(weight, grid, shares)
    importance = torch.ones_like(weight) if shares is None else shares.expand_as(weight)
    errors = [
        float(((one.dequantise().cpu() - weight).square() * importance).sum()) for one in (ours, wanted)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert float((ours.codes.cpu() != wanted.codes).float().mean()) < 0.01
    assert float(ours.dequantise()[0, :block].abs().max()) == 0


@pytest.mark.parametrize("columns", [96, 576, 1280])
@pytest.mark.parametrize("kind", ["asymmetric", "full_range"])
def test_the_sweep_is_the_cpus(columns: int, kind: str) -> None:
    weight, x = made(70, columns)
    moments = Moments(columns)
    moments.add(x)
    order = moments.diagonal.argsort(descending=True)
    found = feedback(moments.sums, order, 0.05)
    assert found is not None
    factor, damping = found
    start = search(weight, Grid(4, 32, kind), moments.diagonal)
    wanted = gptq(weight, factor, order, start)
    on_gpu = type(start)(
        start.grid,
        start.codes.cuda(),
        start.scales.cuda(),
        None if start.zeros is None else start.zeros.cuda(),
    )
    ours = gptq(weight.cuda(), factor.cuda(), order.cuda(), on_gpu)
    # one code on the edge moves what comes after it: of rounding, not of the formula
    assert float((ours.codes.cpu() != wanted.codes).float().mean()) < 0.01
    errors = [output_error(weight, one.dequantise().cpu(), moments.sums) for one in (ours, wanted, start)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] < 0.8 * errors[2]
    fitted = refit(weight.cuda(), ours, moments.sums.cuda(), damping)
    again = refit(weight, wanted, moments.sums, damping)
    assert output_error(weight, fitted.dequantise().cpu(), moments.sums) == pytest.approx(
        output_error(weight, again.dequantise(), moments.sums), rel=0.02
    )


def test_moments_of_16_bits_are_added_up_in_32() -> None:
    _, x = made(1, 1100)
    half = x.cuda().bfloat16()
    moments = Moments(1100, "cuda")
    for part in half.split(1000):
        moments.add(part)
    wanted = half.double().T @ half.double()
    assert float((moments.sums - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
