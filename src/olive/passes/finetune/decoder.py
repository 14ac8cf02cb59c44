"""A whole decoder layer as one function: no module is called inside it, and it can be computed twice.

What transformers, PEFT and torch's checkpointing do around each operation costs a GPU more time than many of
the operations. Computing a layer twice keeps its input alone (Chen et al. 2016, arXiv:1604.06174); dropout
draws the same masks again from the layer's own seed. Imported only where torch already is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from olive.passes.finetune import attention, fused

DECODERS = {"Phi3DecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
Map = Callable[[torch.Tensor], torch.Tensor]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


class Twice(torch.autograd.Function):
    """``run(x)``, computed again in the backward; gradients of parameters are added up where they are.

    ``anchor`` is a scalar that asks for a gradient: the input of the first layer asks for none.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, run: Map, seed: int) -> torch.Tensor:
        """Autograd's forward."""
        ctx.save_for_backward(x)
        ctx.run, ctx.seed = run, seed
        with fused.masks_from(seed, x.device):
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Autograd's backward."""
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), fused.masks_from(ctx.seed, x.device):
            out = ctx.run(again)
        torch.autograd.backward(out, grads[0])
        return again.grad, None, None, None


def attention_of(module: Any, direct: Callable[[nn.Module], Map]) -> Attention:
    """Attention of one packed row of documents, (1, tokens, hidden) to the same.

    Args:
        module: the attention module of a Phi-3, Llama, Mistral or Qwen2.
        direct: gives the function of a linear layer.
    """
    config = module.config
    heads = config.num_attention_heads
    key_heads = config.num_key_value_heads or heads
    # in a model that mixes them, a layer of full attention says None itself
    window = getattr(module if hasattr(module, "sliding_window") else config, "sliding_window", None)
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    projections = [direct(getattr(module, name)) for name in names]
    output = direct(module.o_proj)

    def attend(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, lengths: tuple[int, ...]) -> Any:
        parts = [project(x) for project in projections]
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        query, key, value = fused.SplitRotate.apply(qkv[0], cos, sin, heads, key_heads)
        out = attention.attend(query, key, value, lengths, scale=module.scaling, window=window)
        return output(out.reshape(1, out.shape[0], -1))

    return attend


def mlp_of(module: Any, direct: Callable[[nn.Module], Map]) -> Map:
    """The gated feed-forward layer of such a model."""
    down = direct(module.down_proj)
    if hasattr(module, "gate_up_proj"):
        both = direct(module.gate_up_proj)
        return lambda x: down(fused.SwiGLU.apply(both(x)))
    gate, up = direct(module.gate_proj), direct(module.up_proj)
    return lambda x: down(fused.GatedSiLU.apply(gate(x), up(x)))


def layer_of(module: Any, norms: tuple[Map, Map], attend: Attention, feed: Map) -> Callable[..., Any]:
    """The forward of a decoder layer, with its own where it is not asked for one packed row.

    Args:
        module: the layer; ``_olive_twice`` in its ``__dict__`` says whether it is computed twice.
        norms: before attention and before the feed-forward layer.
        attend: its attention.
        feed: its feed-forward layer.
    """
    before, between = norms

    def forward(self: Any, plain: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths, embeddings = kwargs.get("document_lengths"), kwargs.get("position_embeddings")
        if lengths is None or embeddings is None or hidden_states.shape[0] != 1 or args:
            return plain(hidden_states, *args, **kwargs)
        cos, sin = (x[0] for x in embeddings)
        if cos.shape[-1] != self.self_attn.head_dim:
            return plain(hidden_states, *args, **kwargs)

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x + attend(before(x), cos, sin, lengths)
            return x + feed(between(x))

        if not (self.__dict__["_olive_twice"] and self.training and torch.is_grad_enabled()):
            return run(hidden_states)
        anchor = torch.zeros((), device=hidden_states.device, requires_grad=True)
        return Twice.apply(hidden_states, anchor, run, int(torch.randint(1 << 62, ())))

    return forward
