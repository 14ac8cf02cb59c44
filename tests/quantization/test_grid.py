"""Grids and packing: bit for bit ONNX Runtime's own quantiser and kernels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnxruntime import InferenceSession
from onnxruntime.capi._pybind_state import quantize_matmul_2bits, quantize_matmul_4bits, quantize_matmul_8bits

from olive.quantization.grid import Grid, encode, fit, nearest, round_to_nearest
from olive.quantization.packing import pack, unpack

_THEIRS = {2: quantize_matmul_2bits, 4: quantize_matmul_4bits, 8: quantize_matmul_8bits}


def matrix(rows: int = 12, columns: int = 1024, seed: int = 0) -> torch.Tensor:
    """Random weights, with blocks of zeros, of one sign, of one value, and of one outlier."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03
    weight[0, :256] = 0
    weight[1, :256] = weight[1, :256].abs()
    weight[2, :256] = -weight[2, :256].abs()
    weight[3, :256] = 0.5
    weight[4, 7] = 3.0
    return weight


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), list(itertools.product((2, 4, 8), (16, 32, 64, 128, 256))))
def test_round_to_nearest_is_onnxruntimes_bit_for_bit(bits: int, block: int, symmetric: bool) -> None:
    weight = matrix()
    rows, columns = weight.shape
    blocks = columns // block
    codes = np.zeros((rows, blocks, block * bits // 8), np.uint8)
    scales = np.zeros(rows * blocks, np.float32)
    zeros = np.zeros(rows * -(-blocks * bits // 8), np.uint8)
    _THEIRS[bits](codes, weight.T.contiguous().numpy(), scales, zeros, block, rows, columns, symmetric)
    ours = round_to_nearest(weight, Grid(bits, block, "full_range" if symmetric else "asymmetric"))
    assert np.array_equal(pack(ours.codes, bits).view(rows, blocks, -1).numpy(), codes)
    assert np.array_equal(ours.scales.numpy().ravel(), scales)
    if not symmetric:
        assert np.array_equal(pack(ours.zeros, bits).numpy().ravel(), zeros)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [2, 7, 32])
def test_pairs_are_packed_from_wherever_they_begin(offset: int, count: int) -> None:
    codes = (torch.arange(offset + 3 * count) % 16).to(torch.uint8)[offset:].view(3, count)
    low, high = codes[:, ::2].int(), torch.zeros(3, -(-count // 2), dtype=torch.int32)
    high[:, : count // 2] = codes[:, 1::2]
    assert torch.equal(pack(codes, 4).int(), low + 16 * high)
    assert torch.equal(unpack(pack(codes, 4), 4, count), codes)
    column = codes.T[:2]  # of two rows and columns that are not stored together
    assert torch.equal(unpack(pack(column, 4), 4, 3), column)
    single = codes.view(-1)[: 2 * (count // 2)].as_strided((1, 2 * (count // 2)), (1, 1))
    assert torch.equal(unpack(pack(single, 4), 4, single.shape[1]), single)


def run_kernel(
    bits: int, block: int, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, inputs: np.ndarray
) -> np.ndarray:
    """What MatMulNBits makes of ``inputs`` with float32 activations."""
    rows, columns = scales.shape[0], inputs.shape[1]
    named = {"b": codes, "s": scales} | ({} if zeros is None else {"z": zeros})
    kinds = {"b": TensorProto.UINT8, "s": TensorProto.FLOAT, "z": TensorProto.UINT8}
    node = helper.make_node(
        "MatMulNBits", ["a", *named], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
        block_size=block, accuracy_level=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [helper.make_tensor(n, kinds[n], v.shape, v.tobytes(), raw=True) for n, v in named.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"a": inputs})[0]


@pytest.mark.parametrize("kind", ["asymmetric", "full_range", "symmetric"])
@pytest.mark.parametrize(("bits", "block"), list(itertools.product((2, 4, 8), (16, 32, 64, 128, 256))))
def test_the_kernel_reads_what_is_packed(bits: int, block: int, kind: str) -> None:
    """The table of verified kernels: each equals float64 on the dequantised weights to 2e-5."""
    from olive.passes.quantize.kernels import VERIFIED

    assert block in VERIFIED["CPUExecutionProvider"][bits]
    weight = matrix(rows=16)
    ours = round_to_nearest(weight, Grid(bits, block, kind))
    inputs = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    rows, blocks = ours.scales.shape
    zeros = None if ours.zeros is None else pack(ours.zeros, bits).numpy()
    codes = pack(ours.codes, bits).view(rows, blocks, -1).numpy()
    made = run_kernel(bits, block, codes, ours.scales.numpy(), zeros, inputs.numpy())
    wanted = (inputs.double() @ ours.dequantise().double().T).numpy()
    assert np.abs(made - wanted).max() <= 2e-5 * np.abs(wanted).max()


@given(st.sampled_from((2, 3, 4, 8)), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_packing_turns_round(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_three_bits_are_a_stream_from_the_low_end() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    number = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    assert bytes(pack(codes, 3)[0].tolist()) == number.to_bytes(3, "little")


def test_halves_round_away_from_zero() -> None:
    values = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -0.49999997, 8388607.5])
    assert nearest(values.clone()).tolist() == [1, -1, 2, 3, -3, 0, 0, 8388608]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_error_is_above_half_a_step(bits: int) -> None:
    """Inside a block's range, whatever the kind; a float zero point does not even need 0 in the range."""
    weight = matrix() + 1.0
    grid = Grid(bits, 32, float_zero=True)
    scales, zeros = fit(weight, grid)
    made = (encode(weight, grid, scales, zeros).view(12, -1, 32).float() - zeros[..., None]) * scales[
        ..., None
    ]
    error = (made.view(12, -1) - weight).abs().view(12, -1, 32)
    assert float((error / scales[..., None]).max()) <= 0.5 + 1e-3


@pytest.mark.parametrize("given", [{"bits": 5}, {"block": 0}, {"kind": "symmetric", "float_zero": True}])
def test_grids_that_make_no_sense_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match=r"bits|block|zero"):
        Grid(**given)


def test_blocks_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="100"):
        round_to_nearest(torch.ones(2, 100), Grid(4, 32))
