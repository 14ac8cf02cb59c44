"""A GGUF file as a model folder: config and tokenizer from its metadata, beside a link to the file.

Written without torch or transformers, so that a plan can do it. Byte-level BPE (``gpt2``) and SentencePiece's
(``llama``) become a tokenizer.json; rules that split text before BPE are known by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.errors import ConfigError
from olive.models.foreign.gguf import ARCHITECTURES, file_in, number, view
from olive.models.foreign.gguf_header import Header, read

_CONTROL, _USER = 3, 4  # kinds of tokens that are never split
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_PLAIN = _LEVEL | {"use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name of the rules that split text before BPE -> the steps
SPLIT_RULES: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_PLAIN],
    "default": [_PLAIN],
    "smollm": [_DIGITS, _PLAIN],
    "refact": [_DIGITS, _PLAIN],
    "llama-bpe": [_split(_LLAMA3), _LEVEL],
    "qwen2": [_split(_QWEN2), _LEVEL],
}


def unfold(path: Path, root: Path) -> Path:
    """A folder below ``root`` with config.json, tokenizer and a link to the file; made when missing.

    Raises:
        ConfigError: a model, a tokenizer or a scaling of positions that is not read here.
        UntrustedInput: the file is damaged.
    """
    status = path.stat()
    identity = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|1"
    out = root / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if (out / "config.json").is_file():
        return out
    header = read(path)
    view(header)  # refuses what is not read here
    files = {"config.json": config(header, path)} | tokenizer(header.metadata)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        made = Path(name, "model")
        made.mkdir()
        for file, body in files.items():
            (made / file).write_text(json.dumps(body, indent=1, ensure_ascii=False), encoding="utf-8")
        (made / path.name).symlink_to(path.absolute())
        try:
            os.rename(made, out)
        except OSError:
            if not (out / "config.json").is_file():  # else another process was faster
                raise
    return out


def unfolded(given: Path, root: Path) -> Path:
    """A model folder as it is; of a GGUF file, or a folder of one without config.json, what it unfolds to.

    Args:
        given: folder or file.
        root: the cache folder.
    """
    if given.is_dir() and (given / "config.json").is_file():
        return given
    file = file_in(given) if given.is_dir() else given
    return given if file is None else unfold(file, root / "gguf")


def config(header: Header, path: Path) -> dict[str, Any]:
    """config.json of a model, by its metadata."""
    data = header.metadata
    kind = str(data.get("general.architecture"))
    heads = number(data, f"{kind}.attention.head_count")
    hidden = number(data, f"{kind}.embedding_length")
    size = data.get(f"{kind}.attention.key_length") or hidden // heads
    made: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": number(data, f"{kind}.feed_forward_length"),
        "num_hidden_layers": number(data, f"{kind}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(
            data, f"{kind}.attention.head_count_kv", f"{kind}.attention.head_count"
        ),
        "head_dim": size,
        "max_position_embeddings": number(data, f"{kind}.context_length"),
        "rms_norm_eps": float(f"{data.get(f'{kind}.attention.layer_norm_rms_epsilon', 1e-6):.6g}"),
        "rope_theta": float(data.get(f"{kind}.rope.freq_base", 10000.0)),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": data.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": data.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": data.get("tokenizer.ggml.padding_token_id"),
    }
    if kind == "llama":
        made["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if kind == "phi3":
        made["original_max_position_embeddings"] = made["max_position_embeddings"]
        made["sliding_window"] = data.get("phi3.attention.sliding_window") or None
        made["partial_rotary_factor"] = data.get("phi3.rope.dimension_count", size) / size
    return made | _scaling(header, path, kind, size, made["rope_theta"])


def _scaling(header: Header, path: Path, kind: str, size: int, theta: float) -> dict[str, Any]:
    """How positions are scaled; that of Llama 3 is told by the factors in the file."""
    scaling = header.metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "") or any(name.startswith("rope_factors") for name in header.tensors):
        raise ConfigError(
            f"{path} scales positions by {scaling}, which is not read here",
            where="input_model",
            fix="Use the model as Hugging Face has it.",
        )
    stored = header.tensors.get("rope_freqs.weight")
    if stored is None:
        return {}
    with path.open("rb") as file:
        file.seek(stored.begin)
        factors = struct.unpack(f"<{stored.shape[0]}f", file.read(stored.end - stored.begin))
    known = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    known |= {"factor": max(factors), "original_max_position_embeddings": 8192}
    if max(abs(a - b) / b for a, b in zip(factors, _llama3(size, theta, max(factors)), strict=True)) > 1e-4:
        raise ConfigError(
            f"{path} scales the frequencies of positions in a way that is not known here",
            where="input_model",
            fix="Use the model as Hugging Face has it.",
        )
    return {"rope_scaling": known}


def _llama3(size: int, theta: float, factor: float) -> list[float]:
    """By what Llama 3 divides each frequency: 1 for short waves, ``factor`` for long, between in between."""
    made = []
    for place in range(0, size, 2):
        wave = 2 * math.pi * theta ** (place / size)
        if wave < 8192 / 4.0:
            made.append(1.0)
        elif wave > 8192 / 1.0:
            made.append(factor)
        else:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return made


def llama3_factors(config: Mapping[str, Any]) -> list[float] | None:
    """By what the frequencies of a model are divided, as a file stores it; None where they are as they are.

    Raises:
        ConfigError: Llama 3's scaling with other numbers than Llama 3's own.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    own = (1.0, 4.0, 8192)
    names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if tuple(rope.get(name) for name in names) != own:
        raise ConfigError(f"positions are scaled as Llama 3's, but not with {own}", fix="Use another format.")
    theta = float(config.get("rope_theta", rope.get("rope_theta", 10000.0)))
    return _llama3(size, theta, float(rope["factor"]))


def tokenizer(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, by the metadata.

    Raises:
        ConfigError: a kind of tokenizer that is not read here.
    """
    kind = data.get("tokenizer.ggml.model")
    tokens = data.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(tokens, list):
        raise ConfigError(
            f"the file's tokenizer is of kind {kind!r}; gpt2 and llama are read here",
            where="input_model",
            fix="Use the model as Hugging Face has it.",
        )
    kinds = data.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": place, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kinds[place] == _CONTROL,
        }
        for place, token in enumerate(tokens)
        if kinds[place] in (_CONTROL, _USER)
    ]  # fmt: skip
    body: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    body |= (_byte_level if kind == "gpt2" else _sentence_piece)(data, tokens)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        place = data.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(place, int) and place < len(tokens):
            settings[f"{name}_token"] = tokens[place]
    settings["add_bos_token"] = bool(data.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    settings["clean_up_tokenization_spaces"] = False
    if isinstance(data.get("tokenizer.chat_template"), str):
        settings["chat_template"] = data["tokenizer.chat_template"]
    body["post_processor"] = _begins(settings, tokens) if settings["add_bos_token"] else None
    return {"tokenizer.json": body, "tokenizer_config.json": settings}


def _byte_level(data: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    pre = str(data.get("tokenizer.ggml.pre", "default"))
    if pre not in SPLIT_RULES:
        raise ConfigError(
            f"the file's tokenizer splits text by the rules of {pre!r}, which are not known here",
            where="input_model",
            fix=f"Known are {', '.join(SPLIT_RULES)}; or use the model as Hugging Face has it.",
        )
    merges = [merge.split(" ", 1) for merge in data.get("tokenizer.ggml.merges") or []]
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": SPLIT_RULES[pre]},
        "decoder": _LEVEL | {"use_regex": True},
        "model": _bpe(tokens, merges) | {"ignore_merges": pre == "llama-bpe"},
    }


def _sentence_piece(data: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    scores = data.get("tokenizer.ggml.scores")
    if not isinstance(scores, list):
        raise ConfigError("the file's tokenizer has no scores", where="input_model", fix="Convert it again.")
    ids = {token: place for place, token in enumerate(tokens)}
    found: list[tuple[float, int, int, list[str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], [left, right]))
    prefix = bool(data.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = data.get("tokenizer.ggml.unknown_token_id")
    model = _bpe(tokens, [pair for *_, pair in sorted(found)])
    model |= {"byte_fallback": True, "fuse_unk": True}
    model["unk_token"] = tokens[unknown] if isinstance(unknown, int) else None
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _bpe(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: place for place, token in enumerate(tokens)}, "merges": merges,
    }  # fmt: skip


def _begins(settings: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """A text begins with BOS."""
    bos = settings.get("bos_token")
    if bos is None:
        return None
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    other = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [token, *text],
        "pair": [token, *text, *other],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }
