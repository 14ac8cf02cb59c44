"""Which modules of a model get the functions of ``fused``. Imported only where torch already is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from olive.passes.finetune import attention, fused
from olive.passes.finetune.base_weights import QuantisedLinear, dense_weight

_ATTENTION = {"Phi3Attention", "LlamaAttention", "MistralAttention", "Qwen2Attention"}
_MLP = {"Phi3MLP", "LlamaMLP", "MistralMLP", "Qwen2MLP"}


def patch(model: nn.Module) -> dict[str, int]:
    """Replace the forward of the modules that allow it; returns how many of each kind.

    A module is left alone when its weights are trained, when it computes another formula, or under autocast.
    """
    done = {"norm": 0, "mlp": 0, "attention": 0, "lora": 0}
    for module in list(model.modules()):
        for kind, replacement in (
            ("norm", _norm(module)),
            ("mlp", _mlp(module)),
            ("attention", _attention(module)),
            ("lora", _lora(module)),
        ):
            if replacement is not None:
                _install(module, replacement)
                done[kind] += 1
    return done


def unpatch(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if "_olive_patched" in module.__dict__:
            del module.__dict__["forward"], module.__dict__["_olive_patched"]


def _install(module: nn.Module, replacement: Callable[..., Any]) -> None:
    plain = module.forward

    def forward(self: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        first: Any = x if x is not None else kwargs.get("hidden_states")
        if torch.is_autocast_enabled(first.device.type):
            return plain(*(() if x is None else (x,)), *args, **kwargs)
        return replacement(self, plain, *(() if x is None else (x,)), *args, **kwargs)

    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_olive_patched"] = True


def _norm(module: nn.Module) -> Callable[..., Any] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None or weight.requires_grad:
        return None
    # some families scale by 1 + weight or normalise in another order: believe the numbers, not the name
    with torch.no_grad():
        probe = torch.linspace(-2, 3, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
        if not torch.allclose(
            module(probe).float(), _frozen_norm(probe, weight, eps).float(), rtol=1e-5, atol=1e-6
        ):
            return None

    def forward(self: Any, plain: Any, hidden_states: torch.Tensor) -> Any:
        return _frozen_norm(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _frozen_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return fused.RMSNormFrozen.apply(x, weight, eps)


def _mlp(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__ not in _MLP:
        return None
    activation = getattr(module, "activation_fn", None) or getattr(module, "act_fn", None)
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return None

    if hasattr(module, "gate_up_proj"):

        def merged(self: Any, plain: Any, hidden_states: torch.Tensor) -> Any:
            return self.down_proj(fused.SwiGLU.apply(self.gate_up_proj(hidden_states)))

        return merged

    def separate(self: Any, plain: Any, x: torch.Tensor) -> Any:
        return self.down_proj(fused.GatedSiLU.apply(self.gate_proj(x), self.up_proj(x)))

    return separate


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__ not in _ATTENTION or getattr(module, "attention_dropout", None):
        return None
    config: Any = module.config
    heads = config.num_attention_heads
    key_heads = config.num_key_value_heads or heads
    fused_qkv = hasattr(module, "qkv_proj")

    def forward(self: Any, plain: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths, embeddings = kwargs.get("document_lengths"), kwargs.get("position_embeddings")
        if lengths is None or embeddings is None or hidden_states.shape[0] != 1 or args:
            return plain(hidden_states, *args, **kwargs)
        cos, sin = (x[0] for x in embeddings)
        if cos.shape[-1] != self.head_dim:
            return plain(hidden_states, *args, **kwargs)
        if fused_qkv:
            qkv = self.qkv_proj(hidden_states)
        else:
            qkv = torch.cat(
                [self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], -1
            )
        query, key, value = fused.SplitRotate.apply(qkv[0], cos, sin, heads, key_heads)
        window = getattr(self, "sliding_window", None) or getattr(self.config, "sliding_window", None)
        out = attention.attend(query, key, value, lengths, scale=self.scaling, window=window)
        return self.o_proj(out.reshape(1, out.shape[0], -1)), None

    return forward


def _lora(module: nn.Module) -> Callable[..., Any] | None:
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or type(module) is not Linear:
        return None
    names = list(module.active_adapters)
    base = module.base_layer
    if (
        len(names) != 1
        or names[0] not in module.lora_A
        or type(base) not in (nn.Linear, QuantisedLinear)
        or base.weight.requires_grad
    ):
        return None
    name = names[0]
    low, high, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if getattr(module, "lora_variant", None) or getattr(module, "fan_in_fan_out", False):
        return None
    if high.bias is not None or type(low) is not nn.Linear or type(drop) not in (nn.Dropout, nn.Identity):
        return None
    probability = float(getattr(drop, "p", 0.0))
    scale = float(module.scaling[name])
    factors = fused.Factors(low, high)

    def forward(self: Any, plain: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.disable_adapters or self.merged:
            return plain(x, *args, **kwargs)
        dropping = self.training and probability > 0
        keep = fused.random_keep(x.reshape(-1, x.shape[-1]), probability) if dropping else None
        grow = 65536 / (65536 - round(probability * 65536)) if dropping else 1.0
        weight = partial(dense_weight, base)
        return fused.LoraLinear.apply(
            x, weight, base.bias, low.weight, high.weight, factors, keep, scale * grow
        )

    return forward
