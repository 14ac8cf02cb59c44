"""Which MatMulNBits kernels were held against float64, by execution provider. No heavy import.

Held with onnxruntime 1.32 by tests/quantization/test_grid.py: every pair of bits and block, with and without
zero points. What is not in the table is refused when a plan is made, because a kernel that does not exist may
give zeros without a word (onnxruntime#28551).
"""

from __future__ import annotations

_BLOCKS = (16, 32, 64, 128, 256)

# provider -> bits -> blocks
VERIFIED: dict[str, dict[int, tuple[int, ...]]] = {
    "CPUExecutionProvider": {2: _BLOCKS, 4: _BLOCKS, 8: _BLOCKS},
}


def blocks_of(provider: str, bits: int) -> tuple[int, ...] | None:
    """Verified blocks; None where nothing is known of the provider."""
    table = VERIFIED.get(provider)
    return None if table is None else table.get(bits, ())
