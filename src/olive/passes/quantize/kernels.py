"""Which MatMulNBits kernels were held against float64, by execution provider. No heavy import.

Held with onnxruntime 1.32 by tests/quantization/test_grid.py: every pair of bits and block, with and without
zero points. What is not in the table is refused when a plan is made, because a kernel that does not exist may
give zeros without a word (onnxruntime#28551).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from olive.errors import Problem, Severity

_BLOCKS = (16, 32, 64, 128, 256)

# provider -> bits -> blocks
VERIFIED: dict[str, dict[int, tuple[int, ...]]] = {
    "CPUExecutionProvider": {2: _BLOCKS, 4: _BLOCKS, 8: _BLOCKS},
}
# provider -> bits of GatherBlockQuantized on bytes, held by tests/passes/test_onnx_weight_only.py
EMBEDDINGS: dict[str, tuple[int, ...]] = {"CPUExecutionProvider": (2, 4, 8)}
# providers whose MatMulBnb4 was held against float64 in every block, by tests/passes/test_onnx_weight_only.py
BNB4 = ("CPUExecutionProvider",)


def blocks_of(provider: str, bits: int) -> tuple[int, ...] | None:
    """Verified blocks; None where nothing is known of the provider."""
    table = VERIFIED.get(provider)
    return None if table is None else table.get(bits, ())


def problems(pairs: Iterable[tuple[int, int]], provider: str, where: str) -> Iterator[Problem]:
    """What is known against pairs of bits and block; a block that no kernel could have is left to others."""
    for bits, block in sorted(pairs):
        blocks = blocks_of(provider, bits)
        if blocks is None:
            yield Problem(
                f"no kernel of {provider} for {bits} bits was verified here",
                severity=Severity.NOTE,
                fix="The parity gate compares the exported model on it.",
            )
        elif block in _BLOCKS and block not in blocks:
            yield Problem(
                f"{provider} has no verified kernel for {bits} bits in blocks of {block}",
                where=where,
                fix=f"Use {', '.join(map(str, blocks))}." if blocks else "Use other bits.",
            )
