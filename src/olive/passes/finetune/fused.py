"""Layers with fewer passes over memory, patched on the instances of one model.

Autograd's own graphs of RMSNorm, SwiGLU, rotary embedding and a LoRA layer keep several copies of the
activations and read them again and again. These functions keep what the backward needs and no more, and
compute no gradient of a frozen weight. Each is used only where the module computes exactly that formula.
Imported only where torch is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch.nn import functional


def gpu() -> Any:
    """The kernels of a GPU."""
    from olive.passes.finetune import gpu_kernels

    return gpu_kernels


class RMSNormFrozen(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` with a frozen weight, reduced in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Autograd's forward."""
        if x.is_cuda:
            out, scale = gpu().norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return out
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        if x.dtype == torch.float32:
            return (x * scale).mul_(weight)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Autograd's backward."""
        x, weight, scale = ctx.saved_tensors
        if x.is_cuda:
            return gpu().norm_backward(grads[0], x, weight, scale), None, None
        grad = grads[0].float() * weight
        wide = x.float()
        dot = (grad * wide).sum(-1, keepdim=True)
        dot.mul_(scale).mul_(scale).mul_(scale).div_(x.shape[-1])
        return grad.mul_(scale).addcmul_(wide, dot, value=-1).to(x.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """``silu(gate) * up`` of (tokens, 2 * size) with gate first; keeps only its input."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        """Autograd's forward."""
        ctx.save_for_backward(both)
        if both.is_cuda:
            return gpu().gated_silu(*both.chunk(2, -1))
        gate, up = both.chunk(2, -1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Autograd's backward."""
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        result = torch.empty_like(both)
        into_gate, into_up = result.chunk(2, -1)
        if both.is_cuda:
            gpu().gated_silu_backward(grads[0], gate, up, into_gate, into_up)
            return result
        torch.mul(grads[0], functional.silu(gate), out=into_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=into_gate)
        return result


class GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up`` of two tensors; keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Autograd's forward."""
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            return gpu().gated_silu(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Autograd's backward."""
        gate, up = ctx.saved_tensors
        if gate.is_cuda:
            pair = torch.empty_like(gate), torch.empty_like(up)
            gpu().gated_silu_backward(grads[0], gate, up, *pair)
            return pair
        into_up = functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), into_up


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, sign: int) -> None:
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)


class SplitRotate(torch.autograd.Function):
    """(tokens, (heads + 2 * key heads) * dim) -> query, key, value, the first two rotated by their position.

    Both halves of ``cos`` and of ``sin`` (tokens, dim) are equal, as transformers makes them, so the backward
    is the rotation by the negative angle.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, key_heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Autograd's forward."""
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.key_heads = heads, key_heads
        if qkv.is_cuda:
            return gpu().split_rotate(qkv, cos, sin, heads, key_heads)
        split = qkv.view(qkv.shape[0], heads + 2 * key_heads, -1)
        turned = torch.empty_like(split[:, : heads + key_heads])
        _rotate(split[:, : heads + key_heads], cos[:, None], sin[:, None], turned, 1)
        return turned[:, :heads], turned[:, heads:], split[:, heads + key_heads :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Autograd's backward."""
        cos, sin = ctx.saved_tensors
        query, key, value = grads
        if query.is_cuda:
            joined = gpu().rotate_back(query, key, value, cos, sin)
            return joined, None, None, None, None
        result = torch.empty(
            query.shape[0],
            ctx.heads + 2 * ctx.key_heads,
            query.shape[2],
            dtype=query.dtype,
            device=query.device,
        )
        _rotate(query, cos[:, None], sin[:, None], result[:, : ctx.heads], -1)
        _rotate(key, cos[:, None], sin[:, None], result[:, ctx.heads : -ctx.key_heads], -1)
        result[:, -ctx.key_heads :] = value
        return result.view(query.shape[0], -1), None, None, None, None


class Layer(Protocol):
    """What holds a weight."""

    @property
    def weight(self) -> Any:
        """The weight now."""


class Factors:
    """A low-rank pair in the dtype of the activations, converted once a ``generation``.

    Fused optimizers leave no trace on the parameters they change, so whoever steps one raises ``generation``.

    Args:
        down: linear layer of the (rank, in) parameter A.
        up: linear layer of the (out, rank) parameter B.
    """

    generation: ClassVar[int] = 0

    def __init__(self, down: Layer, up: Layer) -> None:
        # asked anew each time: sharded parameters are other tensors while a layer runs
        self.down, self.up = down, up
        self._made_of: tuple[Any, ...] = ()
        self._pair = (down.weight, up.weight)

    def scaled(self, dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """``factor * A`` and ``B`` in ``dtype``."""
        made_of = (Factors.generation, dtype, factor)
        if made_of != self._made_of:
            with torch.no_grad():
                self._pair = (self.down.weight * factor).to(dtype), self.up.weight.to(dtype)
            self._made_of = made_of
        return self._pair


class LoraLinear(torch.autograd.Function):
    """``x W^T + bias + scale * dropout(x) A^T B^T`` with W frozen (Hu et al. 2021, arXiv:2106.09685).

    ``keep`` is the dropout mask over the rows of x as bool, or None. Keeps the dropped x, the mask and the
    (tokens, rank) product. ``weight`` gives W; it is asked again in the backward, so that a quantised W is
    never kept expanded. ``factors`` gives A and B, passed too so that their gradients are asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        factors: Factors,
        keep: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        """Autograd's forward."""
        flat = x.reshape(-1, x.shape[-1])
        out = functional.linear(flat, weight(), bias)
        if keep is not None:
            flat = keep.to(x.dtype).mul_(flat)
        down, up = factors.scaled(x.dtype, factor)
        low = functional.linear(flat, down)
        out.addmm_(low, up.t())
        ctx.save_for_backward(flat, keep, low)
        ctx.weight, ctx.factors, ctx.factor, ctx.shape = weight, factors, factor, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Autograd's backward."""
        flat, keep, low = ctx.saved_tensors
        factors: Factors = ctx.factors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        down, up = factors.scaled(grad.dtype, ctx.factor)
        into_low = grad @ up
        into_b = _wide_product(grad, low, factors.up.weight.dtype)
        into_a = _wide_product(into_low, flat, factors.down.weight.dtype).mul_(ctx.factor)
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = grad @ ctx.weight()
            if keep is None:
                into_x.addmm_(into_low, down)
            else:
                into_x.addcmul_(into_low @ down, keep.to(grad.dtype))
            into_x = into_x.view(ctx.shape)
        return into_x, None, None, into_a, into_b, None, None, None


def _wide_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``left^T right`` in ``dtype``; a GPU sums up and stores in float32 at once."""
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return (left.t() @ right).to(dtype)


def random_keep(like: torch.Tensor, drop: float) -> torch.Tensor:
    """A mask of ``like``'s (rows, columns) that is False with probability ``drop``, from torch's generator.

    Probabilities are rounded to 1/65536: one draw of 64 bits serves four elements.
    """
    count = like.numel()
    bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
    bits.random_(-(1 << 63), None)
    # int16 runs from -32768 to 32767
    return (bits.view(torch.int16)[:count] >= round(drop * 65536) - 32768).view(like.shape)
