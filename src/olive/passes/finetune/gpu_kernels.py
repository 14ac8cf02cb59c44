"""What ``fused`` computes on a GPU, in Triton, which comes with torch's CUDA builds. Imported only there.

Each kernel reads its inputs once and computes in float32. torch's compiler makes three to ten times slower
ones of the rotation and of SwiGLU's backward, and they take longer to call.
"""

from __future__ import annotations

import torch
import triton
from triton import language as tl

from olive.quantization.blockwise import Quantised, codes_of, dynamic_codes
from olive.quantization.launch import Kernel

_GROUP = 16  # heads a program turns at once
_COLUMNS = 1024
_BYTES = 1024  # of codes that a program expands


@triton.jit  # type: ignore[untyped-decorator]
def _turn(  # type: ignore[no-untyped-def]
    src, dst, cos, sin, heads, src_row, dst_row,
    SIGN: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, GROUP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[:, None]
    place = tl.arange(0, PAD)[None, :]
    inside = (head < heads) & (place < HALF)
    c = tl.load(cos + token * 2 * HALF + place, mask=place < HALF).to(tl.float32)
    s = tl.load(sin + token * 2 * HALF + place, mask=place < HALF).to(tl.float32) * SIGN
    near = src + token * src_row + head * 2 * HALF + place
    a = tl.load(near, mask=inside).to(tl.float32)
    b = tl.load(near + HALF, mask=inside).to(tl.float32)
    out = dst + token * dst_row + head * 2 * HALF + place
    tl.store(out, (a * c - b * s).to(dst.dtype.element_ty), mask=inside)
    tl.store(out + HALF, (b * c + a * s).to(dst.dtype.element_ty), mask=inside)


def turn(src: torch.Tensor, dst: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
    """Rotate (tokens, heads, dim) by its position's angle into ``dst``.

    Args:
        src: last two axes contiguous.
        dst: of the same shape, last two axes contiguous.
        cos: (tokens, dim), contiguous, both halves equal.
        sin: the same.
        sign: 1, or -1 for the negative angle.
    """
    tokens, heads, dim = src.shape
    grid = (tokens, triton.cdiv(heads, _GROUP))
    half = dim // 2
    rows = (src.stride(0), dst.stride(0))
    _TURN(grid, src, dst, cos, sin, heads, *rows, sign, half, triton.next_power_of_2(half), _GROUP)


def split_rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, (heads + 2 * key heads) * dim) -> query, key, value, the first two rotated."""
    split = qkv.contiguous().view(qkv.shape[0], heads + 2 * key_heads, -1)
    turned = torch.empty_like(split)
    turn(split[:, : heads + key_heads], turned[:, : heads + key_heads], cos, sin, 1)
    turned[:, heads + key_heads :] = split[:, heads + key_heads :]
    return turned[:, :heads], turned[:, heads : heads + key_heads], turned[:, heads + key_heads :]


def rotate_back(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Gradients of query, key and value -> that of their common projection, (tokens, width)."""
    heads, key_heads = query.shape[1], key.shape[1]
    shape = (query.shape[0], heads + 2 * key_heads, query.shape[2])
    joined = torch.empty(shape, dtype=query.dtype, device=query.device)
    turn(_rows(query), joined[:, :heads], cos, sin, -1)
    turn(_rows(key), joined[:, heads : heads + key_heads], cos, sin, -1)
    joined[:, heads + key_heads :] = value
    return joined.view(shape[0], -1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu(gate, up, out, size, gate_row, up_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gate + row * gate_row + place, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_row + place, mask=inside).to(tl.float32)
    tl.store(out + row * size + place, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _swiglu_back(  # type: ignore[no-untyped-def]
    grad, gate, up, into_gate, into_up, size, grad_row, gate_row, up_row, into_row,
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    d = tl.load(grad + row * grad_row + place, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_row + place, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_row + place, mask=inside).to(tl.float32)
    share = tl.sigmoid(g)
    slope = share * (1 + g * (1 - share))
    at = row * into_row + place
    tl.store(into_gate + at, (d * u * slope).to(into_gate.dtype.element_ty), mask=inside)
    tl.store(into_up + at, (d * g * share).to(into_up.dtype.element_ty), mask=inside)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of (..., size), rows of whichever stride."""
    size = gate.shape[-1]
    g, u = gate.reshape(-1, size), up.reshape(-1, size)
    out = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    grid = (g.shape[0], triton.cdiv(size, _COLUMNS))
    _SWIGLU(grid, g, u, out, size, g.stride(0), u.stride(0), _COLUMNS)
    return out.view(gate.shape)


def gated_silu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, into_gate: torch.Tensor, into_up: torch.Tensor
) -> None:
    """Gradients of ``gate`` and ``up`` into two tensors whose rows have the same stride."""
    size = gate.shape[-1]
    d, g, u, dg, du = (x.reshape(-1, size) for x in (grad, gate, up, into_gate, into_up))
    grid = (g.shape[0], triton.cdiv(size, _COLUMNS))
    rows = (d.stride(0), g.stride(0), u.stride(0), dg.stride(0))
    _SWIGLU_BACK(grid, d, g, u, dg, du, size, *rows, _COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    codes, scales, outer, offset, grid, dynamic, out, count,
    DOUBLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + byte, mask=2 * byte < count, other=0).to(tl.int32)
    block = 2 * byte // WIDTH
    if DOUBLE:
        eight = tl.load(scales + block, mask=2 * byte < count, other=0).to(tl.int32)
        scale = tl.load(dynamic + eight) * tl.load(outer + block // 256, mask=2 * byte < count, other=0)
        scale += tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=2 * byte < count, other=0)
    high = tl.load(grid + (code >> 4)) * scale
    low = tl.load(grid + (code & 15)) * scale
    both = tl.interleave(high, low)
    place = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out + place, both.to(out.dtype.element_ty), mask=place < count)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(x, weight, out, scales, size, eps, PAD: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PAD)
    inside = place < size
    value = tl.load(x + row * size + place, mask=inside, other=0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / size + eps)
    tl.store(scales + row, scale)
    rounded = (value * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * size + place, (rounded * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm_back(  # type: ignore[no-untyped-def]
    grad, x, weight, scales, into, size, PAD: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PAD)
    inside = place < size
    value = tl.load(x + row * size + place, mask=inside, other=0).to(tl.float32)
    given = tl.load(grad + row * size + place, mask=inside, other=0).to(tl.float32)
    given *= tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + row)
    dot = tl.sum(given * value) / size * scale * scale * scale
    tl.store(into + row * size + place, (given * scale - value * dot).to(into.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Root mean square norm of the last axis; also the factor of each row, float32 (rows,)."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    out, scales = torch.empty_like(flat), torch.empty(len(flat), dtype=torch.float32, device=x.device)
    _NORM((len(flat), 1), flat, weight, out, scales, size, eps, triton.next_power_of_2(size))
    return out.view(x.shape), scales


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Gradient of ``x``."""
    size = x.shape[-1]
    flat, given = x.reshape(-1, size), grad.reshape(-1, size)
    into = torch.empty_like(flat)
    _NORM_BACK((len(flat), 1), given, flat, weight, scales, into, size, triton.next_power_of_2(size))
    return into.view(x.shape)


_TURN, _SWIGLU, _SWIGLU_BACK = Kernel(_turn), Kernel(_swiglu), Kernel(_swiglu_back)
_NORM, _NORM_BACK = Kernel(_norm, num_warps=8), Kernel(_norm_back, num_warps=8)
_EXPAND = Kernel(_expand, enable_fp_fusion=False)
_TABLES: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}


def expand(value: Quantised, dtype: torch.dtype) -> torch.Tensor:
    """The (rows, columns) matrix that 4-bit codes with an even block size stand for."""
    device, kind = value.codes.device, value.scheme.kind
    if (kind, str(device)) not in _TABLES:
        dynamic = torch.tensor(dynamic_codes(), device=device)
        _TABLES[kind, str(device)] = (codes_of(kind, str(device)), dynamic)
    grid, dynamic = _TABLES[kind, str(device)]
    out = torch.empty(value.shape, dtype=dtype, device=device)
    double = value.outer is not None
    _EXPAND(
        (triton.cdiv(value.codes.numel(), _BYTES), 1),
        value.codes, value.scales, value.outer if double else value.scales,
        value.offset if double else value.scales, grid, dynamic, out, out.numel(),
        double, value.scheme.block, _BYTES,
    )  # fmt: skip
    return out
