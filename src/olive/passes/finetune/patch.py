"""Which modules of a model get the functions of ``fused``. Imported only where torch already is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn

from olive.passes.finetune import decoder, fused
from olive.passes.finetune.base_weights import QuantisedLinear, dense_weight

_ATTENTION = {"Phi3Attention", "LlamaAttention", "MistralAttention", "Qwen2Attention"}
_MLP = {"Phi3MLP", "LlamaMLP", "MistralMLP", "Qwen2MLP"}


def patch(model: nn.Module) -> dict[str, int]:
    """Replace the forward of the modules that allow it; returns how many of each kind.

    A module is left alone when its weights are trained, when it computes another formula, or under autocast.
    """
    done = {"norm": 0, "mlp": 0, "attention": 0, "lora": 0, "decoder": 0}
    # what is inside a module is replaced before the module
    for module in reversed(list(model.modules())):
        for kind, make in _KINDS.items():
            replacement = make(module)
            if replacement is not None:
                _install(module, replacement)
                done[kind] += 1
                break
    return done


def compute_twice(model: Any, *, offload: bool = False) -> None:
    """Let decoder layers keep their input alone, perhaps on the host, and compute the rest twice."""
    layers = [module for module in model.modules() if "_olive_twice" in module.__dict__]
    for layer in layers:
        layer.__dict__["_olive_twice"] = "host" if offload else "here"
    if not layers:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def unpatch(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        if "_olive_patched" in module.__dict__:
            del module.__dict__["forward"], module.__dict__["_olive_patched"]
            for name in ("_olive_twice", "_olive_host"):
                module.__dict__.pop(name, None)


def _install(module: nn.Module, replacement: Callable[..., Any]) -> None:
    plain = module.forward

    def forward(self: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        first: Any = x if x is not None else kwargs.get("hidden_states")
        if torch.is_autocast_enabled(first.device.type):
            return plain(*(() if x is None else (x,)), *args, **kwargs)
        return replacement(self, plain, *(() if x is None else (x,)), *args, **kwargs)

    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_olive_patched"] = partial(replacement, module, plain)


def _direct(module: nn.Module) -> Callable[..., Any]:
    """What a module computes, without the calls around it where it is replaced."""
    return module.__dict__.get("_olive_patched", module)


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
    feed = decoder.mlp_of(module, _direct)
    return lambda self, plain, x: feed(x)


def _attention(module: nn.Module) -> Callable[..., Any] | None:
    if type(module).__name__ not in _ATTENTION or getattr(module, "attention_dropout", None):
        return None
    attend = decoder.attention_of(module, _direct)

    def forward(self: Any, plain: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths, embeddings = kwargs.get("document_lengths"), kwargs.get("position_embeddings")
        if lengths is None or embeddings is None or hidden_states.shape[0] != 1 or args:
            return plain(hidden_states, *args, **kwargs)
        cos, sin = (x[0] for x in embeddings)
        if cos.shape[-1] != self.head_dim:
            return plain(hidden_states, *args, **kwargs)
        return attend(hidden_states, cos, sin, lengths), None

    return forward


def _decoder(module: Any) -> Callable[..., Any] | None:
    if type(module).__name__ not in decoder.DECODERS:
        return None
    parts = (module.input_layernorm, module.post_attention_layernorm, module.self_attn, module.mlp)
    if any("_olive_patched" not in part.__dict__ for part in parts):
        return None
    if getattr(module.self_attn.config, "resid_pdrop", None):
        return None
    module.__dict__["_olive_twice"] = ""
    norms = (_direct(module.input_layernorm), _direct(module.post_attention_layernorm))
    attend = decoder.attention_of(module.self_attn, _direct)
    return decoder.layer_of(module, norms, attend, decoder.mlp_of(module.mlp, _direct))


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


_KINDS: dict[str, Callable[[Any], Callable[..., Any] | None]] = {
    "norm": _norm,
    "mlp": _mlp,
    "attention": _attention,
    "lora": _lora,
    "decoder": _decoder,
}
