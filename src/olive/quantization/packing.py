"""Codes to bytes and back, in the layout that ONNX Runtime's MatMulNBits reads.

Of a row the codes follow each other from the lowest bits of the first byte on; a row begins with a byte of
its own. 3 bits fill 3 bytes with 8 codes in the same order. Packed rows of whole blocks, viewed as (rows,
blocks, bytes of a block), are MatMulNBits' ``B``; zero points are packed the same way along the blocks. The
checkpoints that Olive 0.9 and later write hold these same bytes.
"""

from __future__ import annotations

import sys

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 (..., n), each below ``2 ** bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 (..., ceil(n bits / 8)); unused high bits of the last byte are 0.
    """
    if bits == 8:
        return codes.contiguous()
    if bits == 3:
        return _pack_bits(codes, bits)
    each = 8 // bits
    short = -codes.shape[-1] % each
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    if bits == 4 and sys.byteorder == "little":
        # in one dimension: of a dimension of 1 the stride may be odd, which such a view does not take
        whole = codes.contiguous().view(-1)
        pairs = (whole.clone() if whole.storage_offset() % 2 else whole).view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] // 2)
    parts = codes.reshape(*codes.shape[:-1], -1, each)
    packed = parts[..., 0].clone()
    for place in range(1, each):
        packed |= parts[..., place] << (place * bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes, uint8 (..., count), of each row that ``pack`` made."""
    if bits == 8:
        return packed[..., :count].contiguous()
    if bits == 3:
        flat = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
        flat = flat.reshape(*packed.shape[:-1], -1)[..., : count * bits]
        weights = torch.tensor([1, 2, 4], dtype=torch.uint8, device=packed.device)
        return (flat.reshape(*packed.shape[:-1], count, bits) * weights).sum(-1, dtype=torch.uint8)
    places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[..., None] >> places) & (2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count].contiguous()


def _pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    flat = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    flat = flat.reshape(*codes.shape[:-1], -1)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8))
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (flat.reshape(*codes.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)
