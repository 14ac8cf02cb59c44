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

    ``anchor`` is a scalar that asks for a gradient: the input of the first layer asks for none. ``host`` is
    where the input waits, where a GPU's memory is short.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, run: Map, seed: int, host: torch.Tensor | None
    ) -> torch.Tensor:
        """Autograd's forward."""
        ctx.run, ctx.seed, ctx.device = run, seed, x.device
        # copies to the host and back are in the stream's order: what is overwritten has been read
        ctx.save_for_backward(x if host is None else host.copy_(x, non_blocking=True))
        with fused.masks_from(seed, x.device):
            return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        """Autograd's backward."""
        (kept,) = ctx.saved_tensors
        x = kept.to(ctx.device, non_blocking=True)
        again = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), fused.masks_from(ctx.seed, x.device):
            out = ctx.run(again)
        torch.autograd.backward(out, grads[0])
        return again.grad, None, None, None, None


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
        host = _host(self, hidden_states) if self.__dict__["_olive_twice"] == "host" else None
        return Twice.apply(hidden_states, anchor, run, int(torch.randint(1 << 62, ())), host)

    return forward


def _host(module: Any, like: torch.Tensor) -> torch.Tensor:
    """Page-locked memory of a layer, in the shape of ``like``."""
    held = module.__dict__.get("_olive_host")
    if held is None or held.numel() < like.numel():
        held = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        module.__dict__["_olive_host"] = held
    return held[: like.numel()].view(like.shape)


class HostEmbedding(nn.Module):
    """A frozen embedding that stays in the host's memory; its rows go to the device.

    Args:
        table: (vocabulary, hidden size).
        device: where the rows go.
    """

    def __init__(self, table: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        # no parameter: it must not follow the model
        self.table, self.device = table.detach().cpu(), device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of ``ids``, best on the CPU, in the shape of ids + (hidden size,)."""
        rows = self.table.index_select(0, ids.cpu().flatten()).view(*ids.shape, -1)
        return rows.pin_memory().to(self.device, non_blocking=True)


def embedding_to_host(causal: Any) -> bool:
    """Keep the embedding in the host's memory; False where it is trained or is the head too."""
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if not embedding_may_wait(embedding, head):
        return False
    causal.set_input_embeddings(HostEmbedding(embedding.weight, embedding.weight.device))
    return True


def embedding_may_wait(embedding: Any, head: Any) -> bool:
    """Whether an embedding is frozen and no other layer's weight."""
    return (
        type(embedding) is nn.Embedding
        and embedding.weight.is_cuda
        and not embedding.weight.requires_grad
        and (head is None or head.weight is not embedding.weight)
    )
