"""What reads and what writes a decoder's residual stream: told from config and tensor headers, without torch.

The stream may be turned by an orthogonal matrix where everything between two layers commutes with it: sums,
factors that are one number, and RMSNorm once its weights are folded into what reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from olive.errors import ConfigError, Problem
from olive.models.artifact import ModelInfo
from olive.models.quantised import EMBEDDING, HEAD, format_of

PLAIN = frozenset(
    {
        "llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "ernie4_5", "granite", "gemma", "mixtral",
        "qwen2_moe", "qwen3_moe",
    }
)  # fmt: skip
ONE_PLUS = frozenset({"gemma"})  # RMSNorm multiplies by 1 + its weight
_LAYER_NORM = "its LayerNorm subtracts the mean, which a rotation does not keep"
_UNKNOWN = "where its residual stream goes is not known"
_POST_NORM = "it normalises what attention and MLP write, with a weight for each channel, before adding it"
_WHY = {
    _LAYER_NORM: (
        "bloom", "cohere", "cohere2", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron",
        "olmo", "opt", "phi", "phimoe", "stablelm", "starcoder2",
    ),
    _POST_NORM: ("exaone4", "gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3"),
}  # fmt: skip
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = r"(?:block_sparse_moe|mlp)\.(?:experts\.\d+\.|shared_expert\.|)"
_READERS = {
    "input_layernorm": re.compile(r"self_attn\.(?:[qkv]_proj|qkv_proj)\.(?P<kind>weight|bias)"),
    "post_attention_layernorm": re.compile(
        _EXPERT + r"(?:gate_proj|up_proj|gate_up_proj|w1|w3|gate|shared_expert_gate)\.(?P<kind>weight|bias)"
    ),
}
_WRITER = re.compile(rf"(?:self_attn\.o_proj|{_EXPERT}(?:down_proj|w2))\.(?:weight|bias)")
_INSIDE = re.compile(r"self_attn\.(?:q_norm|k_norm)\.weight|self_attn\.rotary_emb\.inv_freq")
_FINAL = "model.norm.weight"
_EMBEDDING, _HEAD = f"{EMBEDDING}.weight", f"{HEAD}.weight"


@dataclass(frozen=True, slots=True)
class Fold:
    """How a tensor of the rotated model is made of the original's.

    Attributes:
        source: name of the original tensor.
        norm: name of the norm's weight that its columns are multiplied by.
        reads: its columns are turned by R1, as the stream is.
        writes: its rows (of a bias, its entries) are turned by R1.
        values: first and last + 1 of the rows (entries) of attention's values, turned by R2 head by head.
        mixes: its columns are the heads' outputs, turned by R2 head by head.
        layer: number of its decoder layer, which R2 belongs to; -1 outside of them.
        is_norm: it becomes what multiplies by 1.
    """

    source: str
    norm: str | None = None
    reads: bool = False
    writes: bool = False
    values: tuple[int, int] | None = None
    mixes: bool = False
    layer: int = -1
    is_norm: bool = False


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream of a model.

    Attributes:
        hidden: its width, the order of R1.
        head: width of an attention head, the order of every R2.
        layers: decoder layers.
        one_plus: norms multiply by 1 + their weight.
        tied: embedding and head are one matrix, which become two.
        folds: name of each tensor of the rotated model -> how it is made.
    """

    hidden: int
    head: int
    layers: int
    one_plus: bool
    tied: bool
    folds: Mapping[str, Fold]


def stream_of(info: ModelInfo) -> Stream:
    """How every tensor of a model is turned.

    Raises:
        ConfigError: the model cannot be rotated; why, and what can.
    """
    found = list(check(info))
    if found:
        raise ConfigError(problems=found)
    return _stream(info)


def check(info: ModelInfo) -> Iterator[Problem]:
    """Everything that keeps a model from being rotated."""
    if (method := format_of(info.config)) is not None:
        yield Problem(
            f"the model is stored quantised ({method}); only weights in floating point can be rotated",
            fix="Use the model in floating point as input_model, and quantise after the rotation.",
        )
        return
    kind = str(info.config.get("model_type", ""))
    biased = next((name for name in info.tensors if re.search(r"norm\w*\.bias$", name)), None)
    why = next((why for why, kinds in _WHY.items() if kind in kinds), _LAYER_NORM if biased else None)
    if why or kind not in PLAIN:
        yield Problem(
            f"{kind or 'this model'} cannot be rotated: {why or _UNKNOWN}",
            fix=f"Leave this pass out. It rotates {', '.join(sorted(PLAIN))}.",
        )
        return
    try:
        stream = _stream(info)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        yield Problem(
            f"config.json does not say how wide layers and heads are ({error})",
            fix="Check that config and weights belong together.",
        )
        return
    yield from _unknown(info, stream)
    yield from _shapes(info, stream)


def _stream(info: ModelInfo) -> Stream:
    config = info.config
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    pairs = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    tied = _HEAD not in info.tensors
    folds = {}
    for name in info.tensors:
        fold = _fold(name, heads, pairs, head)
        if fold is not None:
            folds[name] = fold
    if tied:
        folds[_HEAD] = Fold(_EMBEDDING, _FINAL, reads=True)
    layers = int(config["num_hidden_layers"])
    return Stream(hidden, head, layers, str(config["model_type"]) in ONE_PLUS, tied, folds)


def _fold(name: str, heads: int, pairs: int, head: int) -> Fold | None:
    """How one tensor is turned; None where that is not known."""
    outside = {
        _EMBEDDING: Fold(name, reads=True),
        _HEAD: Fold(name, _FINAL, reads=True),
        _FINAL: Fold(name, is_norm=True),
        f"{HEAD}.bias": Fold(name),
    }
    found = _LAYER.fullmatch(name)
    if found is None:
        return outside.get(name)
    number, rest = int(found[1]), found[2]
    if rest in {f"{norm}.weight" for norm in _READERS}:
        return Fold(name, layer=number, is_norm=True)
    if _INSIDE.fullmatch(rest):
        return Fold(name, layer=number)
    if _WRITER.fullmatch(rest):
        return Fold(name, writes=True, mixes=rest == "self_attn.o_proj.weight", layer=number)
    values = None
    if ".qkv_proj." in rest:
        values = (heads + pairs) * head, (heads + 2 * pairs) * head
    elif ".v_proj." in rest:
        values = 0, pairs * head
    for norm, pattern in _READERS.items():
        if (reader := pattern.fullmatch(rest)) is not None:
            weight = reader["kind"] == "weight"
            before = f"model.layers.{number}.{norm}.weight" if weight else None
            return Fold(name, before, reads=weight, values=values, layer=number)
    return None


def _unknown(info: ModelInfo, stream: Stream) -> Iterator[Problem]:
    lost = [name for name in info.tensors if name not in stream.folds]
    wanted = {fold.source for fold in stream.folds.values()}
    wanted |= {fold.norm for fold in stream.folds.values() if fold.norm}
    missing = sorted(wanted - info.tensors.keys())
    if stream.tied and not info.config.get("tie_word_embeddings", True):
        missing.insert(0, _HEAD)
    if lost or missing:
        yield Problem(
            f"it is not known how {lost[0]} meets the residual stream"
            if lost
            else f"the model has no {missing[0]}, and config.json says it is a {info.config['model_type']}",
            fix="Leave this pass out for this model.",
        )


def _shapes(info: ModelInfo, stream: Stream) -> Iterator[Problem]:
    for name, fold in stream.folds.items():
        code, shape = info.tensors.get(fold.source, ("F32", ()))
        inner = stream.head
        wrong = (
            (code not in _FLOATS and (fold.reads or fold.writes or fold.is_norm or fold.values))
            or (fold.reads and (len(shape) != 2 or shape[1] != stream.hidden))
            or (fold.writes and (not 1 <= len(shape) <= 2 or shape[0] != stream.hidden))
            or (fold.mixes and (len(shape) != 2 or shape[1] % inner))
            or (fold.values is not None and (not shape or shape[0] != fold.values[1]))
        )
        if wrong:
            yield Problem(
                f"{name} is stored as {code} {shape}, which does not fit a stream of {stream.hidden} and "
                f"heads of {inner}",
                fix="Check that config and weights belong together.",
            )
            return


def untied_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of the rotated model: embedding and head apart, stored as ``dtype``, no code of its own."""
    made = {name: value for name, value in config.items() if name != "auto_map"}
    made["tie_word_embeddings"] = False
    keys = [key for key in ("dtype", "torch_dtype") if key in made] or ["torch_dtype"]
    return made | dict.fromkeys(keys, dtype)
