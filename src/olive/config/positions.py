"""Text of a document to plain values, with the line and column of every key and item.

JSON is read by a parser of our own, because the standard one keeps no positions, takes the last of two equal
keys and lets NaN through. YAML is read from PyYAML's events with the scalars of YAML 1.2, so that ``1e-4`` is
a number and ``on`` is a string; aliases are counted, not expanded without bound.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from olive.errors import ConfigError

JsonPath = tuple[str | int, ...]
Position = tuple[int, int]

MAX_DEPTH = 100
MAX_VALUES = 200_000
MAX_INT = (1 << 63) - 1
_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed document.

    Attributes:
        value: dicts, lists, strings, numbers, booleans and None.
        positions: JSON path -> (line, column), both from 1; of a member it is the position of its key.
        filename: as shown in messages; None for a document that came from no file.
    """

    value: Any
    positions: dict[JsonPath, Position] = field(default_factory=dict)
    filename: str | None = None

    def where(self, path: JsonPath) -> str:
        """``file:line: $.path``; the line is that of the deepest part of ``path`` in the text."""
        name = show(path)
        if self.filename is None:
            return name
        for length in range(len(path), -1, -1):
            position = self.positions.get(path[:length])
            if position is not None:
                return f"{self.filename}:{position[0]}: {name}"
        return f"{self.filename}: {name}"


def show(path: JsonPath) -> str:
    """A path as people write it: ``$.data_configs[0].name``."""
    text = "$"
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            text += f".{part}"
        else:
            text += f"[{json.dumps(part, ensure_ascii=False)}]"
    return text


def parse(text: str, filename: str) -> Document:
    """Parse a document; ``.yaml`` and ``.yml`` are YAML, ``.json`` is JSON, else the text decides.

    Raises:
        ConfigError: the text is no such document; the message has the line and column.
    """
    lower = filename.lower()
    yaml = lower.endswith((".yaml", ".yml"))
    if not yaml and not lower.endswith(".json"):
        yaml = not text.lstrip("\ufeff \t\r\n").startswith(("{", "["))
    if yaml:
        from olive.config.yaml_positions import parse_yaml

        return parse_yaml(text, filename)
    return _Json(text, filename).parse()


def is_text(text: str) -> bool:
    """Whether the string can be written as UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def parse_int(text: str, base: int = 10) -> int:
    """A whole number of at most 64 bits.

    Raises:
        ValueError: beyond that.
    """
    value = int(text, base) if len(text) < 40 else MAX_INT + 1
    if abs(value) > MAX_INT:
        raise ValueError(f"{text[:24]} is beyond the range of a number")
    return value


def parse_float(text: str) -> float:
    """A finite float.

    Raises:
        ValueError: beyond the range of a double.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond the range of a number")
    return value


_DECODER = json.JSONDecoder()  # reads the strings; its scanner takes one from the opening quote
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_SPACE = re.compile(r"[ \t\r\n]*")
_WORDS = {"true": True, "false": False, "null": None}
_WORD = re.compile(r"-?[A-Za-z_]+")
_HINTS = {
    "'": "JSON strings take double quotes",
    "/": "JSON has no comments",
    "#": "JSON has no comments",
    "}": "a comma before a closing bracket?",
    "]": "a comma before a closing bracket?",
}


class _Json:
    def __init__(self, text: str, filename: str) -> None:
        self.text = text.removeprefix("\ufeff")
        self.filename = filename
        self.positions: dict[JsonPath, Position] = {}
        self.starts = [0, *(match.end() for match in re.finditer(r"\r\n|\r|\n", self.text))]

    def parse(self) -> Document:
        self.positions[()] = self.position(self.skip(0))
        value, end = self.value(self.skip(0), ())
        end = self.skip(end)
        if end < len(self.text):
            self.fail(end, "text after the end of the document")
        return Document(value, self.positions, self.filename)

    def position(self, offset: int) -> Position:
        low, high = 0, len(self.starts)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.starts[middle] <= offset else (low, middle)
        return low + 1, offset - self.starts[low] + 1

    def fail(
        self, offset: int, message: str, fix: str | None = None, path: JsonPath | None = None
    ) -> NoReturn:
        line, column = self.position(min(offset, len(self.text)))
        name = "" if path is None else f": {show(path)}"
        raise ConfigError(message, where=f"{self.filename}:{line}:{column}{name}", fix=fix)

    def skip(self, offset: int) -> int:
        match = _SPACE.match(self.text, offset)
        return match.end() if match else offset

    def value(self, at: int, path: JsonPath) -> tuple[Any, int]:
        if len(path) > MAX_DEPTH:
            self.fail(at, f"nested deeper than {MAX_DEPTH} levels")
        char = self.text[at : at + 1]
        if char == "{":
            return self.mapping(at + 1, path)
        if char == "[":
            return self.sequence(at + 1, path)
        if char == '"':
            return self.string(at)
        return self.scalar(at, path)

    def string(self, at: int) -> tuple[str, int]:
        try:
            text, end = _DECODER.raw_decode(self.text, at)
        except json.JSONDecodeError as error:
            self.fail(error.pos, f"a string that does not read: {error.msg}")
        if not is_text(text):
            self.fail(at, "a string with half of a surrogate pair is no text")
        return text, end

    def scalar(self, at: int, path: JsonPath) -> tuple[Any, int]:
        number = _NUMBER.match(self.text, at)
        if number and not _WORD.match(self.text, at):
            text = number.group()
            try:
                whole = number.group(1) is None and number.group(2) is None
                return (parse_int(text) if whole else parse_float(text)), number.end()
            except ValueError:
                self.fail(at, f"{text[:24]} is beyond the range of a number", path=path)
        word = _WORD.match(self.text, at)
        if word and word.group() in _WORDS:
            return _WORDS[word.group()], word.end()
        if word and word.group().lstrip("-") in ("NaN", "Infinity"):
            self.fail(at, f"{word.group()} is no number a setting can have", path=path)
        if word:
            self.fail(at, f"{word.group()[:40]} is no JSON value", fix="put text in double quotes")
        if at >= len(self.text):
            self.fail(at, "the document ends too early", fix="close every bracket and quote")
        char = self.text[at]
        self.fail(at, f"a value was expected, not {char!r}", fix=_HINTS.get(char))

    def mapping(self, at: int, path: JsonPath) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        at = self.skip(at)
        if self.text[at : at + 1] == "}":
            return found, at + 1
        while True:
            if self.text[at : at + 1] != '"':
                char = self.text[at : at + 1]
                what = f"not {char!r}" if char else "but the document ends"
                self.fail(at, f"a key in double quotes was expected, {what}", fix=_HINTS.get(char))
            start = at
            key, at = self.string(at)
            child = (*path, key)
            if key in found:
                line = self.positions[child][0]
                self.fail(start, f"{key!r} is given twice; first in line {line}", "keep one of them", child)
            self.positions[child] = self.position(start)
            at = self.skip(at)
            if self.text[at : at + 1] != ":":
                self.fail(at, f"a colon was expected after {key!r}")
            found[key], at = self.value(self.skip(at + 1), child)
            at = self.skip(at)
            char = self.text[at : at + 1]
            if char == "}":
                return found, at + 1
            if char != ",":
                self.fail(at, f"a comma or a closing brace was expected after the value of {key!r}")
            at = self.skip(at + 1)

    def sequence(self, at: int, path: JsonPath) -> tuple[list[Any], int]:
        found: list[Any] = []
        at = self.skip(at)
        if self.text[at : at + 1] == "]":
            return found, at + 1
        while True:
            child = (*path, len(found))
            self.positions[child] = self.position(at)
            item, at = self.value(at, child)
            found.append(item)
            at = self.skip(at)
            char = self.text[at : at + 1]
            if char == "]":
                return found, at + 1
            if char != ",":
                self.fail(at, "a comma or a closing bracket was expected in the list")
            at = self.skip(at + 1)
