"""k_quant in parts gives the bits of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.quantization.neural_compressor import weight_only

from olive.passes.export.k_quant import in_parts, k_quant_in_parts


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 16)])
def test_parts_equal_the_whole(bits: int, size: int) -> None:
    data = np.random.default_rng(0).normal(size=(70, 64)).astype(np.float32)
    data[3] = 0.25
    plain = weight_only.quant_tensor_k_quant_cpu
    found = in_parts(plain, workers=2, blocks=9)(data, bits, size)
    with np.errstate(all="ignore"):
        wanted = plain(data, bits, size)
    for part, whole in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(part, whole)
    assert found[0].dtype == np.uint8


def test_the_library_is_given_back_as_it_was() -> None:
    plain = weight_only.quant_tensor_k_quant_cpu
    with k_quant_in_parts():
        assert weight_only.quant_tensor_k_quant_cpu is not plain
    assert weight_only.quant_tensor_k_quant_cpu is plain
