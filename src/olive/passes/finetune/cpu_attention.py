"""Causal attention on a CPU from score matrices of blocks of queries. Imported only where torch already is.

torch's own kernel takes five to nine times as long for 40 documents of 26 tokens, backward included, and 1.2
times as long for one of 1,024.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

# queries of a block: the scores of one stay in the caches of a core
_BLOCK = 48


class CpuAttention(torch.autograd.Function):
    """Attention of documents of one length, computed in float32.

    The query heads that share a key head are stacked, so that both products are plain batched ones. Keeps its
    inputs and computes the weights again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Query (count, length, heads, dim), key and value (count, length, key heads, dim) -> as query."""
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.window = scale, window
        q, k, v = _stacked(query, key, value)
        q.mul_(scale)
        out = torch.empty_like(q)
        for rows, seen in _blocks(query.shape[1], window):
            weights = _weights(q[:, :, rows], k[:, seen], rows, seen, window)
            out[:, :, rows] = (weights @ v[:, seen]).view(out[:, :, rows].shape)
        return _unstacked(out, query)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Autograd's backward."""
        query, key, value = ctx.saved_tensors
        q, k, v = _stacked(query, key, value)
        (grad,) = _stacked(grads[0], like=key)
        q.mul_(ctx.scale)
        into_q, into_k, into_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, seen in _blocks(query.shape[1], ctx.window):
            weights = _weights(q[:, :, rows], k[:, seen], rows, seen, ctx.window)
            own = grad[:, :, rows].flatten(1, 2)
            into_v[:, seen].baddbmm_(weights.transpose(1, 2), own)
            slope = torch.bmm(own, v[:, seen].transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, torch.float32)
            into_q[:, :, rows] = (slope @ k[:, seen]).view(into_q[:, :, rows].shape)
            into_k[:, seen].baddbmm_(slope.transpose(1, 2), q[:, :, rows].flatten(1, 2))
        into_q.mul_(ctx.scale)
        pairs = ((into_q, query), (into_k[:, None], key), (into_v[:, None], value))
        return *(_unstacked(made, given) for made, given in pairs), None, None


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of each block, and the keys that they may look at."""
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _stacked(*tensors: torch.Tensor, like: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Query -> float32 (count * key heads, heads / key heads, length, dim); what follows without that axis.

    Args:
        tensors: (count, length, heads, dim); the last has as many heads as there are key heads.
        like: has as many heads as there are key heads, in place of the last.
    """
    key_heads = (tensors[-1] if like is None else like).shape[2]
    for index, x in enumerate(tensors):
        count, length, heads, dim = x.shape
        wide = x.view(count, length, key_heads, heads // key_heads, dim).permute(0, 2, 3, 1, 4)
        wide = wide.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        stacked = wide.reshape(count * key_heads, heads // key_heads, length, dim)
        yield stacked if index == 0 else stacked[:, 0]


def _unstacked(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_stacked``, in the shape and dtype of ``like``."""
    count, length, heads, dim = like.shape
    key_heads = x.shape[0] // count
    narrow = x.view(count, key_heads, heads // key_heads, length, dim).permute(0, 3, 1, 2, 4)
    return narrow.to(like.dtype, memory_format=torch.contiguous_format).reshape(like.shape)


def _weights(
    query: torch.Tensor, key: torch.Tensor, rows: slice, seen: slice, window: int | None
) -> torch.Tensor:
    """Softmax of the masked scores, (count * key heads, heads / key heads * rows, seen).

    Args:
        query: (count * key heads, heads / key heads, rows, dim), scaled.
        key: (count * key heads, seen, dim).
        rows: places of the queries in their document.
        seen: places of the keys.
        window: keys a query may look back to.
    """
    scores = torch.bmm(query.flatten(1, 2), key.transpose(1, 2))
    split = scores.view(*query.shape[:3], -1)
    if window is None:  # only the last keys are not seen by all
        split[..., rows.start - seen.start :].add_(_mask(rows.stop - rows.start, 0, None))
    else:
        split.add_(_mask(rows.stop - rows.start, rows.start - seen.start, window))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=64)
def _mask(rows: int, offset: int, window: int | None) -> torch.Tensor:
    """Zero where a query may look, minus infinity elsewhere; (rows, offset + rows)."""
    distance = torch.arange(offset, offset + rows)[:, None] - torch.arange(offset + rows)[None]
    seen = (distance >= 0) & (distance < (window or offset + rows + 1))
    return torch.zeros(rows, offset + rows).masked_fill_(~seen, -torch.inf)
