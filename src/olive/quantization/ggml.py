"""Blocks of GGUF files, to and from the bytes of MatMulNBits.

A row is a run of blocks; a block is its scales and then its codes. Q4_0 (18 bytes, 32 weights): float16
scale, half byte j of the low halves is weight j, of the high halves weight j + 16; weight = (code - 8) scale.
Q4_1 (20 bytes) has a float16 minimum beside: weight = code x scale + minimum. Q8_0 (34 bytes): float16
scale, 32 int8. Q6_K (210 bytes, 256 weights): 6-bit codes, an int8 scale for each 16 of them, a float16
scale of those.
Source: ``ggml-quants.h`` and ``ggml-quants.c`` of llama.cpp. Imported only where torch already is.
"""

from __future__ import annotations

import torch

from olive.quantization.packing import pack, unpack


def q4_0(data: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes uint8 (rows, columns / 2) and scales float16 (rows, blocks), zero point 8."""
    blocks = data.view(rows, -1, 18)
    return _in_order(blocks[..., 2:]), _halves(blocks, 0)


def to_q4_0(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of ``q4_0``: uint8 (rows, bytes); scales are rounded to float16."""
    return torch.cat((_bytes(scales), _in_halves(packed, scales.shape[1])), -1).flatten(1)


def q4_1(data: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes, scales and minima float16 (rows, blocks)."""
    blocks = data.view(rows, -1, 20)
    return _in_order(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def to_q4_1(packed: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """The inverse of ``q4_1``."""
    halves = _in_halves(packed, scales.shape[1])
    return torch.cat((_bytes(scales), _bytes(minima), halves), -1).flatten(1)


def zero_points(scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Zero points uint8 of minima that are ``-zero x scale`` to the precision of float16."""
    wide = scales.float()
    return (-minima.float() / torch.where(wide == 0, 1.0, wide)).round().clamp(0, 15).to(torch.uint8)


def q8_0(data: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (rows, columns) and scales float16 (rows, blocks), zero point 128."""
    blocks = data.view(rows, -1, 34)
    return (blocks[..., 2:] ^ 128).flatten(1), _halves(blocks, 0)


def to_q8_0(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of ``q8_0``."""
    blocks = codes.view(codes.shape[0], scales.shape[1], 32) ^ 128
    return torch.cat((_bytes(scales), blocks), -1).flatten(1)


def q6_k(data: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (rows, columns) and scales float32 (rows, columns / 16), zero point 128: the same values.

    A 6-bit code less 32 is an 8-bit code less 128; both scales of a block are multiplied, exact in float32.
    """
    blocks = data.view(rows, -1, 210)
    low = blocks[..., :128].unflatten(-1, (2, 1, 64))  # halves of 128 weights
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32))
    places = torch.tensor([0, 4], dtype=torch.uint8)[:, None]
    low = ((low >> places) & 15).flatten(-2)  # (rows, blocks, 2, 128)
    high = ((high >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3).flatten(-2)
    codes = (low | (high << 4)) + 96
    outer = _halves(blocks, 208).float()[..., None]
    scales = outer * blocks[..., 192:208].contiguous().view(torch.int8).float()
    return codes.flatten(1), scales.flatten(1)


def _halves(blocks: torch.Tensor, place: int) -> torch.Tensor:
    """float16 (rows, blocks) at a place in each block."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16)[..., 0]


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """float16 (rows, blocks) as uint8 (rows, blocks, 2)."""
    return values.half().contiguous()[..., None].view(torch.uint8)


def _in_order(halves: torch.Tensor) -> torch.Tensor:
    """Codes with weights 16 apart in a byte (rows, blocks, 16) as packed rows: neighbours in a byte."""
    codes = torch.cat((halves & 15, halves >> 4), -1).flatten(1)
    return pack(codes, 4)


def _in_halves(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of ``_in_order``."""
    codes = unpack(packed, 4, packed.shape[1] * 2).view(packed.shape[0], blocks, 32)
    return codes[..., :16] | (codes[..., 16:] << 4)
