"""Linear head and cross entropy in one: the logits never exist in full.

The head is frozen, so the gradient of the hidden states is all that training needs, and it is computed in
the forward pass while a block of logits is at hand. Each block of the vocabulary is read once. Imported only
where torch already is.
"""

from __future__ import annotations

from typing import Any

import torch

IGNORE = -100
_BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 128 << 20}
_ROWS = 4096


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        spread = weight.float().mean(0) if smoothing else None
        for start in range(0, hidden.shape[0], _ROWS):
            part, label = hidden[start : start + _ROWS], labels[start : start + _ROWS]
            own = weight.index_select(0, label)
            right = (part.float() * own.float()).sum(-1)
            if bias is not None:
                right += bias[label]
            log_sum, pull = _sweep(part, weight, bias, grad is not None)
            loss = log_sum - (1 - smoothing) * right
            if spread is not None:
                loss -= smoothing * (part.float() @ spread)
                if bias is not None:
                    loss -= smoothing * bias.float().mean()
            losses[start : start + _ROWS] = loss
            if grad is not None:
                pull.sub_(own, alpha=1 - smoothing)
                grad[start : start + _ROWS] = pull if spread is None else pull.sub_(spread, alpha=smoothing)
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None
        scaled = torch.mul(grad, grads[0][:, None], out=torch.empty_like(grad))
        return scaled, None, None, None, None


def _sweep(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pulling: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the vocabulary in blocks; running maximum as in flash attention (arXiv:2205.14135).

    Returns:
        (rows,) log of the sum of exponentials, and (rows, hidden size) softmax @ weight, zero unless
        ``pulling``; both float32.
    """
    rows = hidden.shape[0]
    size = max(256, _BLOCK_BYTES.get(hidden.device.type, 64 << 20) // (4 * max(1, rows)) // 256 * 256)
    top = torch.full((rows, 1), -torch.inf, device=hidden.device)
    mass = torch.zeros_like(top)
    pull = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, weight.shape[0], size):
        block = weight[start : start + size]
        logits = torch.nn.functional.linear(
            hidden, block, None if bias is None else bias[start : start + size]
        ).float()
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        shrink = (top - higher).exp_()
        power = logits.sub_(higher).exp_()
        mass.mul_(shrink).add_(power.sum(-1, keepdim=True))
        if pulling and block.dtype == torch.float32:
            pull.mul_(shrink).addmm_(power, block)
        elif pulling:
            pull.mul_(shrink).add_(power.to(block.dtype) @ block)
        top = higher
    return mass.log().add_(top).squeeze(1), pull.div_(mass)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    smoothing: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cross entropy of each row that has a label.

    Args:
        hidden: (tokens, hidden size).
        weight: (vocabulary, hidden size), frozen.
        labels: (tokens,) the token that follows each row; -100 where there is nothing to learn.
        bias: (vocabulary,), frozen.
        smoothing: label smoothing, as in Szegedy et al. 2016 (arXiv:1512.00567).
        keep: numbers of the rows with a label, where they are known: looking would wait for a GPU.

    Returns:
        float32 (rows with a label,), in nat, in order. Differentiable once with respect to ``hidden``.
    """
    if keep is None:
        keep = (labels != IGNORE).nonzero().squeeze(1)
    if keep.numel() < labels.numel():
        hidden, labels = hidden.index_select(0, keep), labels.index_select(0, keep)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, smoothing)


def use_small_blocks(size: int) -> None:
    """Let blocks of logits on a GPU take ``size`` bytes from now on."""
    _BLOCK_BYTES["cuda"] = size


def head_is_plain(head: Any) -> bool:
    """Whether ``head`` is a frozen linear layer that nothing wraps."""
    return type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters())


def reference_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """The same from (rows with a label, vocabulary) logits, differentiable in all its inputs."""
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
