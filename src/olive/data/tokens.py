"""Text to token ids, with the light ``tokenizers`` library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from olive.config.workflow import PreProcess
from olive.data import labels
from olive.data.chat import ChatTemplate
from olive.data.template import Text
from olive.errors import ConfigError

IGNORE = labels.IGNORE
_AT_ONCE = 1024  # texts whose offsets are in memory together
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, and its labels: the ids, with ``-100`` where nothing is learnt. No shift."""

    ids: list[int]
    labels: list[int]


class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    chat: ChatTemplate | None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; with ``special``, and the tokens the tokenizer itself adds around a text."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""

    def encode_prompt(self, text: Text, pre: PreProcess) -> list[int]:
        """Ids of the prompt: what generation starts from."""

    def encode_row(self, text: Text, pre: PreProcess) -> Encoded:
        """Ids and labels of one row."""

    def encode_rows(self, texts: Iterable[Text], pre: PreProcess) -> list[Encoded]:
        """Ids and labels of many rows; faster than one by one."""


class LightTokenizer:
    """A tokenizer folder read without transformers; gives the ids transformers gives.

    ``tokenizer.json`` is what counts, as for the runtimes. (transformers 5 rebuilds a few classes, such as
    LlamaTokenizer, from the vocabulary alone; where such a folder's file has a normaliser of the old kind,
    its ids differ after special tokens and leading spaces.)

    Attributes:
        bos_id, eos_id, pad_id: ids of the special tokens, None where the tokenizer has none.
        adds_bos, adds_eos: whether the tokenizer itself puts one around a text.
        chat: the model's chat template, if it has one.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, backend: Any, settings: dict[str, Any], chat: str | None = None) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        _add_missing(backend, settings)
        names = {name: _content(settings.get(name)) for name in _NAMED}
        self.bos_id = _id(backend, names["bos_token"])
        self.eos_id = _id(backend, names["eos_token"])
        self.pad_id = _id(backend, names["pad_token"])
        self.vocab_size = int(backend.get_vocab_size(with_added_tokens=True))
        self._special = {
            number
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special or number == self.eos_id
        }
        tokens = {name: token for name, token in names.items() if token is not None}
        self.chat = ChatTemplate(chat, tokens) if chat else None
        # The post-processor alone decides: transformers 5 ignores add_bos_token beside a tokenizer.json.
        # Asked around a text, to tell the two apart where one token is both.
        around = self.encode("a", special=True)
        self.adds_bos = self.bos_id is not None and around[:1] == [self.bos_id]
        self.adds_eos = self.eos_id is not None and around[-1:] == [self.eos_id]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; with ``special``, and the tokens the tokenizer itself adds around a text."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def encode_prompt(self, text: Text, pre: PreProcess) -> list[int]:
        """Ids of the prompt: what generation starts from. BOS where the tokenizer itself puts one."""
        return self._begin(self.encode(text.prompt), pre)

    def encode_row(self, text: Text, pre: PreProcess) -> Encoded:
        """Ids and labels of one row.

        BOS only where the tokenizer itself puts one, EOS at the end, neither twice. With
        ``train_on: completion`` the prompt is tokenised on its own, as generation will see it, and masked.
        A text with spans is tokenised whole and has labels there alone; the template ends its turns, so that
        EOS is added only where the last turn is the assistant's and no special token ends it.

        Raises:
            ConfigError: the tokenizer joins a template's generation prompt and an answer to one token.
        """
        return self.encode_rows([text], pre)[0]

    def encode_rows(self, texts: Iterable[Text], pre: PreProcess) -> list[Encoded]:
        """Ids and labels of many rows; faster than one by one."""
        texts = list(texts)
        spanned = {index for index, text in enumerate(texts) if text.spans is not None}
        if spanned:
            made = iter(self._spanned([texts[index] for index in sorted(spanned)], pre))
            rest = iter(self.encode_rows([t for t in texts if t.spans is None], pre))
            return [next(made if index in spanned else rest) for index in range(len(texts))]
        if pre.train_on in (None, "all"):
            whole = self._batch([text.full for text in texts])
            ids = [self._end(self._begin(row, pre), pre) for row in whole]
            return [Encoded(row, list(row)) for row in ids]
        prompts = self._batch([text.prompt for text in texts])
        completions = self._continuations([text.completion for text in texts])
        return [self._join(*parts, pre) for parts in zip(texts, prompts, completions, strict=True)]

    def _join(self, text: Text, prompt: list[int], completion: list[int], pre: PreProcess) -> Encoded:
        if not text.prompt:
            ids = self._end(self._begin(self.encode(text.completion), pre), pre)
            return Encoded(ids, list(ids))
        prompt = self._begin(prompt, pre)
        completion = self._end(completion, pre)
        return Encoded(prompt + completion, [IGNORE] * len(prompt) + completion)

    def _spanned(self, texts: list[Text], pre: PreProcess) -> list[Encoded]:
        # A post-processor may cut spaces off the offsets, and does nothing else here.
        processor, made = self._backend.post_processor, []
        try:
            self._backend.post_processor = None
            for start in range(0, len(texts), _AT_ONCE):
                some = texts[start : start + _AT_ONCE]
                whole = self._backend.encode_batch([text.full for text in some], add_special_tokens=False)
                made += [
                    self._label(text, one.ids, one.offsets, pre)
                    for text, one in zip(some, whole, strict=True)
                ]
        finally:
            self._backend.post_processor = processor
        return made

    def _label(self, text: Text, ids: list[int], offsets: labels.Offsets, pre: PreProcess) -> Encoded:
        marked, eos = labels.label(text, ids, offsets, self._special)
        begun = self._begin(ids, pre)
        done = self._end(begun, pre) if eos else begun
        return Encoded(done, [IGNORE] * (len(begun) - len(ids)) + marked + done[len(begun) :])

    def _batch(self, texts: list[str]) -> list[list[int]]:
        return [list(one.ids) for one in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts as continuations: without the space some tokenizers put before every text."""
        anchor = self.encode("\n")
        joined = self._batch(["\n" + text for text in texts])
        return [
            ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text)
            for text, ids in zip(texts, joined, strict=True)
        ]

    def _begin(self, ids: list[int], pre: PreProcess) -> list[int]:
        if pre.add_special_tokens and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def _end(self, ids: list[int], pre: PreProcess) -> list[int]:
        if pre.add_special_tokens and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            return [*ids, self.eos_id]
        return ids


def load(folder: Path) -> LightTokenizer:
    """The tokenizer of a model folder.

    A folder that holds only an older format is converted by transformers, which is slow to import.

    Raises:
        ConfigError: the folder has no readable tokenizer.
    """
    from tokenizers import Tokenizer as Backend

    source = folder / "tokenizer.json"
    settings = _settings(folder)
    if source.is_file():
        try:
            backend = Backend.from_file(str(source))
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise ConfigError(f"{source} is not a readable tokenizer: {error}") from error
    elif (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
        from transformers import AutoTokenizer

        converted = AutoTokenizer.from_pretrained(str(folder))
        backend = converted.backend_tokenizer
        settings = {**settings, **{name: getattr(converted, name, None) for name in _NAMED}}
    else:
        raise ConfigError(
            f"model folder {folder} has no tokenizer: looked for tokenizer.json",
            fix="copy the tokenizer files of the model into the folder",
        )
    return LightTokenizer(backend, settings, _chat_source(folder, settings))


def _settings(folder: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is not a JSON object")
        merged.update(found)
    return merged


def _chat_source(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several named templates
        found = next((item.get("template") for item in found if item.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _id(backend: Any, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _add_missing(backend: Any, settings: dict[str, Any]) -> None:
    """Add the special tokens that only the settings name, in the order transformers adds them."""
    from tokenizers import AddedToken

    decoder = settings.get("added_tokens_decoder") or {}
    listed = [
        AddedToken(
            entry["content"],
            single_word=bool(entry.get("single_word")),
            lstrip=bool(entry.get("lstrip")),
            rstrip=bool(entry.get("rstrip")),
            normalized=bool(entry.get("normalized")),
            special=bool(entry.get("special")),
        )
        for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))
    ]
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    names = [_content(settings.get(name)) for name in _NAMED]
    names += [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in listed}
    listed += [
        AddedToken(name, special=True, normalized=False)
        for name in dict.fromkeys(names)
        if name is not None and name not in known
    ]
    present = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    fresh = [token for token in listed if repr(token) not in present]
    if fresh:
        backend.add_tokens(fresh)
