"""A base whose linear layers are rounded before training. Imported only where torch already is.

The codes are this project's own (``olive.quantization.blockwise``), the same on every device; on CUDA one
kernel expands them, scales of scales included. Where memory is plenty, the expanded weights are kept instead:
the numbers are the same, and nothing is expanded in every product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from olive.config.base import Dtype
from olive.models.hf import load_model, open_model
from olive.models.seen import Seen
from olive.passes.base import PassContext
from olive.passes.finetune import attention
from olive.quantization.blockwise import (
    Quantised,
    dequantise,
    quantise,
)

_HEADROOM = 0.5  # of the memory available that an expanded base may take


class QuantisedLinear(nn.Linear):
    """A frozen linear layer that holds its weight in 4 or 8 bits.

    Args:
        value: the quantised (out, in) weight.
        bias: (out,) or None.
        dtype: what the weight is expanded to.
    """

    def __init__(self, value: Quantised, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = value.shape
        self.dtype = dtype
        # the codes are the weight: they move and are sharded as weights are
        self._scales = replace(value, codes=value.codes[:0])
        self.weight = nn.Parameter(value.codes, requires_grad=False)
        frozen = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def value(self) -> Quantised:
        """The quantised (out, in) weight."""
        return replace(self._scales, codes=self.weight.view(self._scales.codes.dtype))

    def look_like_floats(self) -> None:
        """Hold the same bytes as a floating dtype: what shards weights takes no integers."""
        if self.weight.shape[-1] % 2 == 0:
            self.weight = nn.Parameter(self.weight.data.view(torch.bfloat16), requires_grad=False)

    def dense(self) -> torch.Tensor:
        """The (out, in) weight, expanded."""
        if self.weight.device.type != "cuda" or self._scales.scheme.kind == "int8":
            return dequantise(self.value, self.dtype)
        from olive.passes.finetune.gpu_kernels import expand

        return expand(self.value, self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``input W^T + bias``."""
        return nn.functional.linear(input, self.dense().to(input.dtype), self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        """Follow the model to another device; scales keep their dtype whatever the model is cast to."""
        device = fn(torch.empty(0, device=self.weight.device)).device
        if device != self.weight.device:
            self._scales = self._scales.to(device)
            self.weight.data = self.weight.data.to(device)
        if self.bias is not None:
            self.bias.data = fn(self.bias.data)
        return self


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, expanded where it is quantised."""
    return layer.dense() if isinstance(layer, QuantisedLinear) else layer.weight  # type: ignore[return-value]


def quantise_base(
    model: Any, folder: Path, seen: Seen, *, dtype: torch.dtype, device: str, keep_expanded: bool
) -> None:
    """Round the linear layers of ``model`` that ``seen`` names, from the weights stored in ``folder``.

    Args:
        model: loaded on the CPU.
        folder: its folder; weights are rounded from what is stored, not from what the model was cast to.
        seen: which layers, and how.
        dtype: of the expanded weights.
        device: where the codes are made and stay.
        keep_expanded: hold expanded weights instead of codes.
    """
    with open_model(folder)[0] as stored, torch.no_grad():
        for name in sorted(seen.modules):
            layer = model.get_submodule(name)
            weight = stored[f"{name}.weight"].to(device).float()
            if (factors := seen.initial.get(name)) is not None:
                weight = weight - factors[1].to(device) @ factors[0].to(device)
            value = quantise(weight, seen.scheme)
            if keep_expanded:
                layer.weight = nn.Parameter(dequantise(value, dtype), requires_grad=False)
            else:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, QuantisedLinear(value, layer.bias, dtype))


def linear_names(model: Any, spared: Iterable[str] = (), *, quantised: bool = False) -> list[str]:
    """Names of the linear layers but the head and those whose name ends in ``spared``.

    Args:
        model: a causal language model.
        spared: ends of names.
        quantised: also those that are quantised already.
    """
    head, kinds = model.get_output_embeddings(), (nn.Linear, QuantisedLinear) if quantised else (nn.Linear,)
    ends = tuple(spared)
    return [
        name
        for name, layer in model.named_modules()
        if type(layer) in kinds
        and layer is not head
        and not any(name == end or name.endswith(f".{end}") for end in ends)
    ]


def load_on_cpu(folder: Path, dtype: Dtype) -> PreTrainedModel:
    """The base on the CPU, with the packed attention."""
    return load_model(folder, dtype=dtype, attn_implementation=attention.register())


def round_base(base: Any, folder: Path, seen: Seen, dtype: Dtype, ctx: PassContext) -> PreTrainedModel:
    """Round the layers that ``seen`` names and put the model on its device."""
    device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
    wide = getattr(torch, dtype)
    expanded = sum(base.get_submodule(name).weight.numel() for name in seen.modules) * wide.itemsize
    whole = ctx.place.strategy != "fsdp" or ctx.place.size == 1
    keep = device == "cpu" and whole and expanded < _HEADROOM * ctx.machine.memory_available
    quantise_base(base, folder, seen, dtype=wide, device=device, keep_expanded=keep)
    base.olive_seen = seen
    ctx.facts["base"] = f"{seen.kind}, {'expanded once' if keep else 'expanded in each product'}"
    return base.to(device)
