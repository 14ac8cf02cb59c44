"""Rows to text: format strings, joined columns and chat templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Any, TypeVar

from olive.config.workflow import PreProcess
from olive.data import formats
from olive.data.chat import PLAIN, ChatTemplate
from olive.data.mixture import groups, name_of, scatter
from olive.data.spans import Span, find
from olive.errors import ConfigError, Problem, raise_errors

T = TypeVar("T")
_KEYED = re.compile(r"([^\[\]]+)(?:\[[^\[\]]+\])+")


@dataclass(frozen=True, slots=True)
class Text:
    """A rendered row.

    Attributes:
        prompt: what comes before the last field, less one trailing space: that space is part of the
            completion's first token, in training and in generation alike.
        completion: the rest: the last field and what follows it.
        answer: the value of the last field alone.
        spans: the assistant's turns in the whole text, where they alone are learnt; else None.
    """

    prompt: str
    completion: str
    answer: str
    spans: tuple[Span, ...] | None = None

    @property
    def full(self) -> str:
        """The whole text."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class _Piece:
    literal: str
    field: str | None
    spec: str
    conversion: str | None


def fields(template: str) -> list[str]:
    """Fields of a format string in order, repeats included.

    Raises:
        ConfigError: the string is not a format string, or a field has no name.
    """
    return [piece.field for piece in _parse(template) if piece.field is not None]


def check(pre: PreProcess, columns: Iterable[str]) -> list[Problem]:
    """What of the format, the template or ``text_cols`` does not fit the columns; ``pre`` is resolved."""
    known = tuple(columns)
    if pre.format is not None:
        return formats.unfit(pre, known)
    if pre.chat_template:
        needed, setting = [pre.message_col], "message_col"
    elif pre.text_template is not None:
        needed, setting = list(dict.fromkeys(fields(pre.text_template))), "text_template"
        if not needed:
            return [
                Problem(
                    "text_template has no field, so every row would be the same text",
                    fix=f"name a column in braces; the data has {formats.listing(known)}",
                )
            ]
    else:
        needed, setting = list(pre.text_cols), "text_cols"
    missing = [name for name in needed if _root(name, known) is None]
    return [
        Problem(
            f"{setting} names {name!r}, which is no column of the data",
            fix=f"the data has {formats.listing(known)}{_nearest(name, known)}",
        )
        for name in missing
    ]


def render(pre: PreProcess, row: Mapping[str, Any], chat: ChatTemplate | None = None) -> Text:
    """The text of one row.

    Args:
        pre: format, template, ``text_cols`` or chat template.
        row: column -> value.
        chat: the model's chat template; needed when ``pre.chat_template`` is true.

    Raises:
        ConfigError: a field is no column, a value is null, or the chat turns do not render.
    """
    return _render(groups(pre, [row])[0].pre, row, chat)


def _render(pre: PreProcess, row: Mapping[str, Any], chat: ChatTemplate | None) -> Text:
    if pre.format is not None or pre.chat_template:
        return _render_chat(pre, row, chat)
    if pre.text_template is None:
        raise_errors(check(pre, row))
        values = [_plain(row[name], name) for name in pre.text_cols]
        head, last = values[:-1], values[-1]
        return Text(" ".join(head), f" {last}" if head else last, last)
    return _render_template(pre, row)


def render_all(
    pre: PreProcess, rows: Sequence[Mapping[str, Any]], chat: ChatTemplate | None = None
) -> list[Text]:
    """The text of every row.

    Raises:
        ConfigError: as ``render``; one error names every kind of fault with its count and first row. A value
            that one row lacks and another has counts as null.
    """
    parts = [(group, _render_rows(group.pre, group.rows, chat)) for group in groups(pre, rows)]
    return parts[0][1] if len(parts) == 1 else scatter(len(rows), parts)


def _render_rows(pre: PreProcess, rows: Sequence[Mapping[str, Any]], chat: ChatTemplate | None) -> list[Text]:
    known = dict.fromkeys(name for row in rows for name in row)
    if rows:
        raise_errors(check(pre, known))
    return each(rows, lambda row: _render(pre, row if len(row) == len(known) else {**known, **row}, chat))


def check_turns(pre: PreProcess, rows: Sequence[Mapping[str, Any]]) -> None:
    """Whether every row is a conversation, without rendering it; ``pre`` is resolved.

    Raises:
        ConfigError: as ``render_all``.
    """
    each(rows, lambda row: formats.turns(pre, row))


def each(rows: Sequence[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], T]) -> list[T]:
    """What ``make`` makes of every row; one error names each kind of fault with its count and first row."""
    made: list[T] = []
    faults: dict[str, tuple[str, int, str | None]] = {}
    for index, row in enumerate(rows):
        try:
            made.append(make(row))
        except ConfigError as error:
            for problem in error.problems:
                first, count, _ = faults.get(problem.message, (name_of(row, index), 0, None))
                faults[problem.message] = (first, count + 1, problem.fix)
    raise_errors(
        Problem(message, first + (f" and {count - 1} more" if count > 1 else ""), fix)
        for message, (first, count, fix) in faults.items()
    )
    return made


def _render_template(pre: PreProcess, row: Mapping[str, Any]) -> Text:
    pieces = _parse(pre.text_template or "")
    last = max((index for index, piece in enumerate(pieces) if piece.field is not None), default=None)
    if last is None or any(p.field is not None and _root(p.field, row) is None for p in pieces):
        raise_errors(check(pre, row))
    before: list[str] = []
    after: list[str] = []
    answer = ""
    for index, piece in enumerate(pieces):
        (after if last is not None and index > last else before).append(piece.literal)
        if piece.field is None:
            continue
        value = _value(row, piece)
        if index == last:
            answer = value
            after.append(value)
        else:
            before.append(value)
    prompt, completion = "".join(before), "".join(after)
    if prompt.endswith(" "):
        prompt, completion = prompt[:-1], " " + completion
    return Text(prompt, completion, answer)


def chat_of(pre: PreProcess, chat: ChatTemplate | None) -> ChatTemplate | None:
    """What turns are rendered with: the document's template, the model's, or None for plain paragraphs.

    Raises:
        ConfigError: the document wants the model's, and it has none.
    """
    if isinstance(pre.chat_template, str):
        return ChatTemplate(pre.chat_template, chat.tokens if chat else {})
    if chat is None and pre.chat_template:
        raise ConfigError(
            "chat_template is true but the model's tokenizer has none",
            fix="write the template itself as chat_template, or use text_template",
        )
    return chat


def bare(prompt: str, completion: str) -> Text:
    """A prompt and its completion with nothing around them."""
    moved = prompt.endswith(" ")
    return Text(prompt[: len(prompt) - moved], " " * moved + completion, completion)


def _render_chat(pre: PreProcess, row: Mapping[str, Any], chat: ChatTemplate | None) -> Text:
    chat = chat_of(pre, chat)
    raise_errors(check(pre, row))
    if chat is None:
        if (plain := formats.plain(pre, row)) is not None:
            return bare(*plain)
        chat = PLAIN
    turns = formats.turns(pre, row)
    full = chat.render(turns)
    spans = find(chat, turns, full) if pre.train_on == "assistant" else None
    content = turns[-1].get("content")
    if turns[-1].get("role") == "assistant" and isinstance(content, str):
        prompt = chat.render(turns[:-1], add_generation_prompt=True)
        if full.startswith(prompt):
            return Text(prompt, full[len(prompt) :], content, spans)
    if pre.train_on == "completion":
        raise ConfigError(
            "the chat turns have no completion: the last turn must be the assistant's, and the template "
            "must render the turns before it as a prefix of the whole",
            fix="end each conversation with an assistant turn, or set train_on to all",
        )
    return Text("", full, "", spans)


@lru_cache(maxsize=64)
def _parse(template: str) -> tuple[_Piece, ...]:
    try:
        parsed = [
            _Piece(text, name, spec or "", conversion)
            for text, name, spec, conversion in Formatter().parse(template)
        ]
    except ValueError as error:
        raise ConfigError(
            f"text_template is not a format string: {error}", fix="write {{ and }} for literal braces"
        ) from error
    for piece in parsed:
        if piece.field == "":
            raise ConfigError("a field of text_template has no name: {}", fix="name a column in the braces")
        if "{" in piece.spec:
            raise ConfigError(f"field {piece.field!r} of text_template has a nested format")
    return tuple(parsed)


def _root(name: str, columns: Iterable[str]) -> str | None:
    """The column a field reads: the one of that very name, else the one before ``[key]``."""
    known = columns if isinstance(columns, Mapping | tuple) else tuple(columns)
    if name in known:
        return name
    keyed = _KEYED.fullmatch(name)
    return keyed[1] if keyed and keyed[1] in known else None


def _value(row: Mapping[str, Any], piece: _Piece) -> str:
    name = piece.field or ""
    if name in row:
        value = row[name]
    else:
        root, _, keys = name.partition("[")
        value = row[root]
        for key in keys.removesuffix("]").split("]["):
            try:
                value = value[int(key)] if isinstance(value, list) else value[key]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise ConfigError(f"field {name!r} finds nothing in column {root!r}") from error
    if value is None:
        return _plain(value, name)
    if piece.conversion:
        value = Formatter().convert_field(value, piece.conversion)
    try:
        return format(value, piece.spec)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"field {name!r} cannot format {value!r} as {piece.spec!r}: {error}") from error


def _plain(value: Any, name: str) -> str:
    if value is None:
        raise ConfigError(f"column {name!r} is null or missing", fix="drop such rows or fill them in")
    return str(value)


def _nearest(name: str, columns: Iterable[str]) -> str:
    from difflib import get_close_matches

    match = get_close_matches(name, list(columns), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
