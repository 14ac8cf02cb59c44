"""Codes in the words of GPTQ, AWQ and compressed-tensors, to and from the bytes of MatMulNBits.

All of them store ``(code - zero) * scale`` with codes in 32-bit words, low bits first. They differ in which
way a word runs: GPTQ packs along the inputs of a matrix that is stored inputs x outputs, AWQ along its
outputs in an order of its own, compressed-tensors along the inputs of outputs x inputs. So a format changes
by transposing words and moving half bytes; no code is looked at on its own, and none is rounded. A machine
is taken to be little-endian, as safetensors is. Imported only where torch already is.

Sources: AutoGPTQ's ``QuantLinear.pack`` (v1 stores a zero point less 1), AutoAWQ's ``WQLinear_GEMM``,
compressed-tensors' ``pack_to_int32``.
"""

from __future__ import annotations

import torch

from olive.quantization.packing import pack, unpack

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that a word's half bytes hold, from the low ones on
_LOW, _HIGH = _AWQ[::2], _AWQ[1::2]


def words_down(words: torch.Tensor) -> torch.Tensor:
    """GPTQ's ``qweight``, int32 (inputs x bits / 32, outputs), as bytes (outputs, inputs x bits / 8).

    Any number of bits: 3-bit codes run on from word to word, and so they do from byte to byte.
    """
    return as_bytes(words.T)


def to_words_down(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``words_down``; a row's bytes must fill words."""
    return as_words(packed).T.contiguous()


def words_across(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes, uint8 (rows, count), of int32 words that run along a row."""
    return unpack(as_bytes(words), bits, count)


def to_words_across(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``words_across``; the last word is filled up with 0."""
    packed = pack(codes, bits)
    return as_words(torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)))


def awq_bytes(words: torch.Tensor) -> torch.Tensor:
    """AWQ's ``qweight``, int32 (inputs, outputs / 8), as bytes (outputs, inputs / 2); inputs are even."""
    inputs, groups = words.shape
    pairs = as_bytes(words).view(inputs // 2, 2, groups * 4)
    even, odd = pairs[:, 0], pairs[:, 1]
    low = ((even & 15) | (odd << 4)).T.contiguous()
    high = ((even >> 4) | (odd & 240)).T.contiguous()
    out = torch.empty((groups, 8, inputs // 2), dtype=torch.uint8)
    for place in range(4):
        out[:, _LOW[place]] = low[place::4]
        out[:, _HIGH[place]] = high[place::4]
    return out.view(groups * 8, inputs // 2)


def to_awq_words(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of ``awq_bytes``; outputs must be a multiple of 8."""
    outputs, half = packed.shape
    groups = packed.view(outputs // 8, 8, half)
    low = (groups[:, list(_LOW)].reshape(outputs // 2, half)).T.contiguous()
    high = (groups[:, list(_HIGH)].reshape(outputs // 2, half)).T.contiguous()
    words = torch.empty((half, 2, outputs // 2), dtype=torch.uint8)
    words[:, 0] = (low & 15) | (high << 4)
    words[:, 1] = (low >> 4) | (high & 240)
    return as_words(words.view(half * 2, outputs // 2))


def awq_codes(words: torch.Tensor) -> torch.Tensor:
    """AWQ's ``qzeros``, int32 (blocks, outputs / 8), as codes uint8 (blocks, outputs)."""
    codes = words_across(words, 4, words.shape[1] * 8)
    ordered = torch.empty_like(codes).view(-1, 8)
    ordered[:, list(_AWQ)] = codes.view(-1, 8)
    return ordered.view(codes.shape)


def to_awq_code_words(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of ``awq_codes``."""
    return to_words_across(codes.reshape(-1, 8)[:, list(_AWQ)].reshape(codes.shape), 4)


def less_one(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points as the first version of GPTQ's format stores them: less 1, modulo the number of codes."""
    return (codes + (2**bits - 1)) & (2**bits - 1) if bits < 8 else codes - 1


def plus_one(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``less_one``."""
    return (codes + 1) & (2**bits - 1)


def block_order(index: torch.Tensor, width: int) -> torch.Tensor | None:
    """Which group each block of inputs belongs to, int64 (blocks,), by a ``g_idx`` (inputs,).

    Returns:
        None where groups follow each other as blocks do.

    Raises:
        ValueError: the inputs of a group do not lie together: an activation order that no operator of ONNX
            Runtime has.
    """
    if index.numel() % width:
        raise ValueError(f"{index.numel()} inputs do not divide into blocks of {width}")
    blocks = index.view(-1, width)
    if not bool((blocks == blocks[:, :1]).all()):
        raise ValueError("inputs of a group do not lie together")
    order = blocks[:, 0].long()
    return None if torch.equal(order, torch.arange(len(order))) else order


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """int32 (rows, n) as uint8 (rows, 4 n)."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def as_words(packed: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, 4 n) as int32 (rows, n)."""
    return packed.reshape(-1).view(torch.int32).view(packed.shape[0], -1)
