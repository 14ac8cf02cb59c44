"""Block-wise rounding against bitsandbytes and against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olive.quantization import blockwise
from olive.quantization.blockwise import Scheme, dequantise, quantise

functional = pytest.importorskip("bitsandbytes.functional")
SHAPES = [(96, 576), (64, 7), (3, 5), (1, 64)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [64, 128])
def test_single_quantisation_is_that_of_bitsandbytes_bit_for_bit(
    kind: str, shape: tuple[int, int], block: int
) -> None:
    weight = matrix(*shape)
    ours = quantise(weight, Scheme(kind, block, double=False))  # type: ignore[arg-type]
    codes, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=block)
    assert torch.equal(ours.scales, state.absmax)
    if shape[1] % block == 0 or weight.numel() < block:  # its CPU kernel expects blocks to end with rows
        assert torch.equal(dequantise(ours), functional.dequantize_4bit(codes, state))
    if kind == "nf4":  # fp4 has a zero of either sign
        assert torch.equal(ours.codes, codes.view(-1))


def test_the_dynamic_type_is_that_of_bitsandbytes() -> None:
    assert torch.equal(torch.tensor(blockwise.dynamic_codes()), functional.create_dynamic_map())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_is_that_of_bitsandbytes_to_one_step_of_a_scale(kind: str) -> None:
    weight = matrix(512, 576)
    ours = quantise(weight, Scheme(kind, 64, double=True))  # type: ignore[arg-type]
    codes, state = functional.quantize_4bit(weight, quant_type=kind, blocksize=64, compress_statistics=True)
    assert float((ours.offset - state.offset).abs()) <= 1e-7 * float(state.offset)
    off = (ours.scales.int() - state.absmax.int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 0.01
    # where a code differs, ours is the nearer one
    single = quantise(weight, Scheme(kind, 64, double=False)).scales  # type: ignore[arg-type]
    error = (blockwise.block_scales(ours) - single).abs()
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert bool((error <= (theirs - single).abs() * (1 + 1e-5) + 1e-9).all())
    assert torch.allclose(dequantise(ours), functional.dequantize_4bit(codes, state), atol=2e-3)


@pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("fp4", 64, False), Scheme("int8", 64, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_counted_as_they_are(scheme: Scheme, shape: tuple[int, int]) -> None:
    assert quantise(matrix(*shape), scheme).nbytes == scheme.bytes_of(*shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(0, 99), st.sampled_from(["nf4", "fp4", "int8"]))
def test_every_weight_goes_to_the_nearest_value(rows: int, columns: int, seed: int, kind: str) -> None:
    weight = matrix(rows, columns, seed)
    value = quantise(weight, Scheme(kind, 32, double=False))  # type: ignore[arg-type]
    got = dequantise(value).double()
    if kind == "int8":
        half = value.scales.double()[:, None] / 2
        assert bool(((got - weight).abs() <= half * (1 + 1e-6)).all())
        return
    scales = value.scales.repeat_interleave(32)[: rows * columns].view(rows, columns).double()
    grid = blockwise.codes_of(kind).double() * scales[..., None]  # type: ignore[arg-type]
    nearest = (grid - weight.double()[..., None]).abs().amin(-1)
    assert bool(((got - weight).abs() <= nearest + 1e-6 * scales).all())


def test_zeros_stay_zero_and_nothing_is_nan() -> None:
    for kind in ("nf4", "fp4", "int8"):
        for double in (False, True):
            value = dequantise(quantise(torch.zeros(4, 64), Scheme(kind, 64, double)))  # type: ignore[arg-type]
            assert torch.equal(value, torch.zeros(4, 64))


def test_rounding_twice_changes_nothing() -> None:
    scheme = Scheme("nf4", 64, double=False)
    once = blockwise.round_trip(matrix(32, 128), scheme)
    assert torch.equal(blockwise.round_trip(once, scheme), once)
