"""A decoder as the builder walks over it, made of mapped weights, without importing modelling code.

The builder reads modules by their class and attributes, not by what they compute. For architectures whose
checkpoints name every weight as their modules do, such a tree takes milliseconds where importing and making
the transformers model takes seconds. Imported only where torch already is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from olive.models.stream import LazyTensors, stored_dtype

# their builders read nothing but weights, biases and norms; tests hold each against transformers' own module
ARCHITECTURES = frozenset(
    {
        "Ernie4_5ForCausalLM", "GemmaForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM",
        "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
    }
)  # fmt: skip
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = "model.layers."
_HEAD, _EMBEDDING, _NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


class DecoderLayer(nn.Module):
    """A layer; the builder knows it by the end of its class's name."""


def unfit(tensors: LazyTensors, config: Any, layers: int) -> str | None:
    """Why a checkpoint is left to transformers; None where every weight is what the architecture says.

    Args:
        tensors: the model's.
        config: its transformers config.
        layers: that the builder exports.
    """
    architecture = (config.architectures or ["none"])[0]
    if architecture not in ARCHITECTURES:
        return f"architecture {architecture}"
    if layers != config.num_hidden_layers:
        return "a part of the layers"
    dtypes = {tensors.code(name) for name in tensors if not _COMPUTED.search(name)}
    if len(dtypes) != 1 or not dtypes <= {"F32", "F16", "BF16"}:
        return f"weights stored as {', '.join(sorted(dtypes))}"
    asked = getattr(config, "dtype", None)
    if asked is not None and str(asked).removeprefix("torch.") != str(stored_dtype(*dtypes)).split(".")[1]:
        return f"weights stored as {next(iter(dtypes))}, to be loaded as {asked}"
    found = {name: tensors.shape(name) for name in tensors if not _COMPUTED.search(name)}
    if bool(config.tie_word_embeddings) == (_HEAD in found):
        return "a head that is tied and stored, or neither"
    found.setdefault(_HEAD, found.get(_EMBEDDING, ()))
    wanted = dict(_layout(config, fused=f"{_LAYER}0.mlp.gate_up_proj.weight" in found))
    biases = {name for name in found if name.endswith("_proj.bias")}
    for name in biases:
        rows = wanted.get(f"{name.removesuffix('bias')}weight", (0,))[0]
        if found[name] != (rows,):
            return f"{name} of shape {found[name]}"
    names = (found.keys() | wanted.keys()) - biases
    if different := [name for name in names if found.get(name) != wanted.get(name)]:
        name = min(different)
        return f"{name} of shape {found.get(name)}, not {wanted.get(name)}"
    return None


def _layout(config: Any, *, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights but biases."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) * size
    yield _EMBEDDING, (config.vocab_size, hidden)
    yield _NORM, (hidden,)
    yield _HEAD, (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        layer = f"{_LAYER}{number}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, heads * size)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
        if config.architectures[0] == "Qwen3ForCausalLM":
            yield f"{layer}self_attn.q_norm.weight", (size,)
            yield f"{layer}self_attn.k_norm.weight", (size,)
        if fused:
            yield f"{layer}self_attn.qkv_proj.weight", (heads * size + 2 * shared, hidden)
            yield f"{layer}mlp.gate_up_proj.weight", (2 * inner, hidden)
            continue
        yield f"{layer}self_attn.q_proj.weight", (heads * size, hidden)
        for part in "kv":
            yield f"{layer}self_attn.{part}_proj.weight", (shared, hidden)
        for part in ("gate", "up"):
            yield f"{layer}mlp.{part}_proj.weight", (inner, hidden)


def build(tensors: LazyTensors, layers: int) -> nn.Module:
    """The tree of an opened model that ``unfit`` found nothing against; its weights stay in their files."""
    root, body = nn.Module(), nn.Module()
    root.model = body
    embedding = tensors[_EMBEDDING]
    body.embed_tokens = _module("embed_tokens", {"weight": embedding})
    by_layer: list[dict[str, dict[str, torch.Tensor]]] = [{} for _ in range(layers)]
    for name in tensors:
        if name.startswith(_LAYER) and not _COMPUTED.search(name):
            number, _, rest = name.removeprefix(_LAYER).partition(".")
            module, _, kind = rest.rpartition(".")
            by_layer[int(number)].setdefault(module, {})[kind] = tensors[name]
    body.layers = nn.ModuleList(_layer(modules) for modules in by_layer)
    body.norm = _module("norm", {"weight": tensors[_NORM]})
    head = tensors[_HEAD] if _HEAD in tensors else embedding  # noqa: SIM401 - they are no mapping
    root.lm_head = _module("lm_head", {"weight": head})
    return root


def _layer(modules: Mapping[str, Mapping[str, torch.Tensor]]) -> DecoderLayer:
    layer = DecoderLayer()
    for name, values in modules.items():
        place: nn.Module = layer
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, _module(last, values))
    return layer


def _module(name: str, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """An embedding, a linear layer, or a norm: weight and bias are parameters or None."""
    weight = values["weight"]
    module = nn.Module()
    if weight.dim() == 2:
        rows, columns = weight.shape
        if name == "embed_tokens":  # given a weight, it makes none: torch's random start on meta is an import
            module = nn.Embedding(rows, columns, _weight=weight, _freeze=True)
        else:
            module = nn.Linear(columns, rows, bias="bias" in values, device="meta")
    for kind in ("weight", "bias"):
        value = values.get(kind)
        module.register_parameter(kind, None if value is None else nn.Parameter(value, requires_grad=False))
    return module
