"""Causal attention over packed documents that computes nothing across documents.

A forward pass sees one row of tokens that holds several documents. Documents of like length are gathered into
one batch; the shorter ones are padded at their end, where a causal mask hides the padding from every real
token, so the result is exact. Imported only where torch already is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from olive.passes.finetune.cpu_attention import CpuAttention

NAME = "olive_packed"


@dataclass(frozen=True, slots=True)
class Group:
    """Documents attended to together.

    Attributes:
        count: documents.
        length: tokens of the longest.
        rows: (count * length,) source row of each slot; padding points at a row that exists.
        slots: (tokens,) destination of the real rows, as indices into ``count * length``.
        targets: (tokens,) packed rows those slots belong to.
        span: first and last row when the slots are exactly a run of rows, else None.
    """

    count: int
    length: int
    rows: torch.Tensor
    slots: torch.Tensor
    targets: torch.Tensor
    span: tuple[int, int] | None


def bucket(lengths: Sequence[int], waste: float = 0.3, floor: int = 48) -> list[list[int]]:
    """Group document indices by like length.

    Args:
        lengths: tokens of each document.
        waste: largest share of a document's slot that may be padding.
        floor: documents at most this long always share a group: starting one costs more than their padding.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (longest <= floor or lengths[index] >= (1 - waste) * longest):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@lru_cache(maxsize=256)
def plan(lengths: tuple[int, ...], device: str = "cpu") -> tuple[Group, ...]:
    """How to attend to packed documents of ``lengths``."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    made = []
    for members in bucket(lengths):
        members = sorted(members)
        longest = max(lengths[index] for index in members)
        rows = torch.zeros(len(members), longest, dtype=torch.long)
        slots, targets = [], []
        for place, index in enumerate(members):
            own = torch.arange(starts[index], starts[index + 1])
            rows[place, : lengths[index]] = own
            slots.append(torch.arange(lengths[index]) + place * longest)
            targets.append(own)
        target = torch.cat(targets)
        exact = len(target) == rows.numel() and bool((target.diff() == 1).all())
        made.append(
            Group(
                len(members),
                longest,
                rows.flatten().to(device),
                torch.cat(slots).to(device),
                target.to(device),
                (int(target[0]), int(target[-1]) + 1) if exact else None,
            )
        )
    return tuple(made)


class _Gather(torch.autograd.Function):
    """Rows (tokens, heads, dim) of one group as (count, length, heads, dim).

    Every real row is used once, so the backward is a gather too, without index_select's atomic adds.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group, ctx.shape = group, rows.shape
        return rows.index_select(0, group.rows).view(group.count, group.length, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        group: Group = ctx.group
        flat = grads[0].reshape(group.count * group.length, *ctx.shape[1:])
        real = flat.index_select(0, group.slots)
        if len(group.targets) == ctx.shape[0]:
            result = torch.empty(ctx.shape, dtype=real.dtype, device=real.device)
        else:
            result = torch.zeros(ctx.shape, dtype=real.dtype, device=real.device)
        result.index_copy_(0, group.targets, real)
        return result, None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float | None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention inside each document.

    Args:
        query: (tokens, heads, dim).
        key: (tokens, key heads, dim).
        value: (tokens, key heads, dim).
        lengths: tokens of each document, in order; their sum is ``tokens``.
        scale: factor of the scores; None for 1 / sqrt(dim).
        dropout: probability on the attention weights.
        window: keys a query may look back to, itself included (sliding-window models).

    Returns:
        (tokens, heads, dim)
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        return _variable_length(query, key, value, lengths, scale, window)
    groups = plan(lengths, str(query.device))
    parts = []
    for group in groups:
        whole = group.span is not None
        if whole and group.span == (0, query.shape[0]):
            picked = [x.view(group.count, group.length, *x.shape[1:]) for x in (query, key, value)]
        elif whole and group.span is not None:
            first, last = group.span
            picked = [
                x[first:last].view(group.count, group.length, *x.shape[1:]) for x in (query, key, value)
            ]
        else:
            picked = [_Gather.apply(x, group) for x in (query, key, value)]
        if query.device.type == "cpu" and not dropout:
            factor = query.shape[-1] ** -0.5 if scale is None else scale
            out = CpuAttention.apply(*picked, factor, window)
        else:
            q, k, v = (x.transpose(1, 2) for x in picked)
            out = _causal(q, k, v, scale, dropout, window).transpose(1, 2)
        flat = out.reshape(group.count * group.length, *out.shape[2:])
        parts.append(flat if whole else flat.index_select(0, group.slots))
    if len(groups) == 1:
        return parts[0] if groups[0].span else parts[0].index_select(0, _inverse(lengths, str(query.device)))
    return torch.cat(parts).index_select(0, _inverse(lengths, str(query.device)))


@lru_cache(maxsize=256)
def _inverse(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    return torch.cat([group.targets for group in plan(lengths, device)]).argsort()


def _variable_length(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Flash attention (arXiv:2307.08691) on all documents at once, without padding."""
    if len(set(lengths)) == 1 and window is None:
        return _equal_lengths(query, key, value, len(lengths), scale)
    ends, longest = _ends(lengths, str(query.device)), max(lengths)
    sides = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, ends, ends, longest, longest, 0.0, True, False, scale=scale, **sides
    )[0]
    return out


def _equal_lengths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int, scale: float | None
) -> torch.Tensor:
    """Documents of one length as a batch, by the fastest kernel there is: cuDNN's on Hopper."""
    q, k, v = (x.view(count, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel([*best, SDPBackend.MATH], set_priority=True):
        out = _causal(q, k, v, scale, 0.0, None)
    return out.transpose(1, 2).reshape(query.shape)


@lru_cache(maxsize=256)
def _ends(lengths: tuple[int, ...], device: str) -> torch.Tensor:
    """(documents + 1,) int32: where each document begins, and the end."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _causal(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        distance = torch.arange(length, device=query.device)
        distance = distance[:, None] - distance[None, :]
        mask = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function transformers calls; without ``document_lengths`` each batch row is one document.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, dim).
        key: (batch, key heads, tokens, dim).
        value: (batch, key heads, tokens, dim).
        attention_mask: unused; packed rows hold no padding.
        dropout: probability on the attention weights.
        scaling: factor of the scores.
        kwargs: ``document_lengths`` (tokens of each document of the one row) and ``sliding_window``.

    Returns:
        (batch, tokens, heads, dim) and no weights.
    """
    window = kwargs.get("sliding_window")
    lengths = kwargs.get("document_lengths")
    if lengths is None or query.shape[0] != 1:
        return _causal(query, key, value, scaling, dropout, window).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(q, k, v, tuple(lengths), scale=scaling, dropout=dropout, window=window)
    return out[None], None


def register() -> str:
    """Make the function known to transformers; returns its name. Repeating it is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The packed function needs no mask, so none is built."""
