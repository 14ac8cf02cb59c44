"""Write a GGUF file with one tensor in memory at a time, and a tokenizer as its metadata."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import InternalError, PassFailed
from olive.models.foreign.gguf_folder import SPLIT_RULES
from olive.models.foreign.gguf_header import TYPES
from olive.models.hf import read_json

if TYPE_CHECKING:
    import torch

_NUMBERS = {name: (number, block, size) for number, (name, block, size) in TYPES.items()}
_ALIGNMENT = 32
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_FIX = "Save it as gptq, awq or compressed-tensors, or convert it with llama.cpp's own tool."


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its type's name, its shape (rows first), and what gives its bytes (uint8)."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes of data."""
        _, block, size = _NUMBERS[self.kind]
        return prod(self.shape) // block * size


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Entry]) -> int:
    """Write a file of version 3; returns the bytes of tensor data.

    Args:
        path: the file to make.
        metadata: text, bool, int (uint32), float (float32), or a list of one of text, int (int32), float.
        tensors: name -> tensor, in order.

    Raises:
        InternalError: a tensor came out in another size than it was announced with.
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for name, value in metadata.items():
        parts.append(_text(name) + _value(value))
    offset = 0
    for name, one in tensors.items():
        number = _NUMBERS[one.kind][0]
        dims = struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *one.shape[::-1])
        parts.append(_text(name) + dims + struct.pack("<IQ", number, offset))
        offset += -(-one.size // _ALIGNMENT) * _ALIGNMENT
    head = b"".join(parts)
    total = 0
    with path.open("wb") as file:
        file.write(head + b"\0" * (-len(head) % _ALIGNMENT))
        for name, one in tensors.items():
            data = one.make().contiguous().reshape(-1)
            if data.nbytes != one.size:
                raise InternalError(f"{name} came out in {data.nbytes} bytes, announced were {one.size}")
            file.write(data.numpy().data)
            file.write(b"\0" * (-one.size % _ALIGNMENT))
            total += one.size
    return total


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        whole = all(isinstance(one, int) for one in value)
        kind, form = (5, "i") if whole else (6, "f")
        return struct.pack(f"<IIQ{len(value)}{form}", 9, kind, len(value), *value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def tokenizer(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The tokenizer of a model folder in llama.cpp's terms.

    Args:
        folder: with tokenizer.json.
        vocabulary: rows of the embedding; ids without a token are filled up with unused ones.

    Raises:
        PassFailed: a kind of tokenizer, or rules to split text, that llama.cpp has no name for here.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PassFailed(f"{folder} has no tokenizer.json", where="SaveGguf", fix=_FIX)
    body = read_json(path)
    settings = _settings(folder)
    model = body.get("model") or {}
    vocab = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocab, dict):
        raise PassFailed(
            f"the tokenizer is of kind {model.get('type')}, and llama.cpp reads BPE",
            where="SaveGguf",
            fix=_FIX,
        )
    tokens, kinds = _tokens(body, vocab, vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
    made: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    if model.get("byte_fallback"):
        made |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        made["tokenizer.ggml.scores"] = _scores(tokens, merges)
        text = json.dumps(body.get("normalizer")) + json.dumps(body.get("pre_tokenizer"))
        made["tokenizer.ggml.add_space_prefix"] = "Prepend" in text or '"prepend_scheme"' in text
    else:
        made |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _rules(body)}
        made["tokenizer.ggml.merges"] = merges
    named = {token: place for place, token in enumerate(tokens)}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{ours}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in named:
            made[f"tokenizer.ggml.{theirs}_token_id"] = named[token]
    made["tokenizer.ggml.add_bos_token"] = bool(settings.get("add_bos_token", False))
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    return made | ({"tokenizer.chat_template": chat} if isinstance(chat, str) else {})


def _settings(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            merged |= read_json(folder / name)
    return merged


def _tokens(
    body: Mapping[str, Any], vocab: Mapping[str, int], vocabulary: int
) -> tuple[list[str], list[int]]:
    """Token and kind of each id."""
    found = {place: (token, _NORMAL) for token, place in vocab.items()}
    for one in body.get("added_tokens") or ():
        found[one["id"]] = (one["content"], _CONTROL if one.get("special") else _USER)
    fallback = bool(body["model"].get("byte_fallback"))
    unknown = body["model"].get("unk_token")
    tokens, kinds = [], []
    for place in range(max(vocabulary, max(found) + 1)):
        token, kind = found.get(place, (f"[PAD{place}]", _UNUSED))
        if fallback and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        tokens.append(token)
        kinds.append(_UNKNOWN if token == unknown and kind == _CONTROL else kind)
    if len(tokens) > vocabulary:
        raise PassFailed(
            f"the tokenizer has {len(tokens)} tokens, the embedding {vocabulary} rows",
            where="SaveGguf",
            fix="Check that the tokenizer belongs to the model.",
        )
    return tokens, kinds


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Scores that give the order of merges: the earlier a merge, the higher the token it makes."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _rules(body: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules that split text before BPE."""
    given = body.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers") if given.get("type") == "Sequence" else [given]
    for name, rules in SPLIT_RULES.items():
        if [_essence(step) for step in rules] == [_essence(step) for step in steps or ()]:
            return name
    raise PassFailed(
        "the tokenizer splits text by rules that llama.cpp has no name for here", where="SaveGguf", fix=_FIX
    )


def _essence(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a step does, without defaults that are spelt out or not."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return kind, step.get("use_regex", True), step.get("add_prefix_space", True)
    if kind == "Split":
        return kind, (step.get("pattern") or {}).get("Regex"), step.get("behavior"), step.get("invert", False)
    return kind, step.get("individual_digits")
