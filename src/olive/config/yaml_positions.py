"""YAML to plain values with positions. See ``positions``."""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from olive.config.positions import (
    MAX_DEPTH,
    MAX_VALUES,
    Document,
    JsonPath,
    Position,
    parse_float,
    parse_int,
    show,
)
from olive.errors import ConfigError

_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_TRUE, _FALSE, _NULL = (
    ("true", "True", "TRUE"),
    ("false", "False", "FALSE"),
    ("null", "Null", "NULL", "~", ""),
)
_CORE = "tag:yaml.org,2002:"
_TAGS = {f"{_CORE}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")} | {"!"}


def parse_yaml(text: str, filename: str) -> Document:
    """Parse one YAML document of plain values.

    Raises:
        ConfigError: not YAML, more than one document, equal keys, a custom tag, NaN, too deep or too large.
    """
    try:
        return _Yaml(text.removeprefix("\ufeff"), filename).parse()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{filename}:{mark.line + 1}:{mark.column + 1}" if mark else filename
        message = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"no YAML: {message}", where=where) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"no YAML: {' '.join(str(error).split())}", where=filename) from error


class _Yaml:
    def __init__(self, text: str, filename: str) -> None:
        self.events = yaml.parse(text, Loader=yaml.SafeLoader)
        self.filename = filename
        self.positions: dict[JsonPath, Position] = {}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.count = 0

    def parse(self) -> Document:
        value: Any = None
        seen = False
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                if seen:
                    self.fail(event, (), "a second document in the file", "keep one document a file")
                seen = True
                value = self.value(next(self.events), ())
        if not seen:
            raise ConfigError("the document is empty", where=self.filename)
        return Document(value, self.positions, self.filename)

    def fail(self, event: Event, path: JsonPath, message: str, fix: str | None = None) -> NoReturn:
        line, column = _mark(event)
        raise ConfigError(message, where=f"{self.filename}:{line}:{column}: {show(path)}", fix=fix)

    def grow(self, event: Event, path: JsonPath, by: int) -> None:
        self.count += by
        if self.count > MAX_VALUES:
            self.fail(event, path, f"more than {MAX_VALUES} values (aliases count each time)")

    def value(self, event: Event, path: JsonPath) -> Any:
        self.positions.setdefault(path, _mark(event))
        if len(path) > MAX_DEPTH:
            self.fail(event, path, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, AliasEvent):
            known = self.anchors.get(str(event.anchor))
            if known is None:
                self.fail(event, path, f"*{event.anchor} refers to nothing before it")
            self.grow(event, path, known[1])
            return _copy(known[0])
        before = self.count
        self.grow(event, path, 1)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS:
            self.fail(event, path, f"the tag {tag} is not accepted", "write a plain value")
        if isinstance(event, MappingStartEvent):
            found: Any = self.mapping(path)
        elif isinstance(event, SequenceStartEvent):
            found = self.sequence(path)
        elif isinstance(event, ScalarEvent):
            found = self.scalar(event, path)
        else:
            self.fail(event, path, "a value was expected")
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[str(anchor)] = (found, self.count - before)
        return found

    def sequence(self, path: JsonPath) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            found.append(self.value(event, (*path, len(found))))
        return found

    def mapping(self, path: JsonPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                self.fail(event, path, "a key must be text")
            key = str(event.value)
            child = (*path, key)
            if key == "<<" and event.style is None:
                self.merge(merged, next(self.events), child)
                continue
            if key in found:
                line = self.positions[child][0]
                self.fail(event, child, f"{key!r} is given twice; first in line {line}", "keep one of them")
            self.positions[child] = _mark(event)
            found[key] = self.value(next(self.events), child)
        return found | {key: value for key, value in merged.items() if key not in found}

    def merge(self, merged: dict[str, Any], event: Event, path: JsonPath) -> None:
        value = self.value(event, path)
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, dict):
                self.fail(event, path, "<< takes a mapping or a list of mappings")
            for key, item in part.items():
                merged.setdefault(key, item)

    def scalar(self, event: ScalarEvent, path: JsonPath) -> Any:
        text = str(event.value)
        tag = (event.tag or "").removeprefix(_CORE)
        if tag in ("str", "!") or (not tag and event.style is not None):
            return text
        try:
            return resolve(text)
        except ValueError as error:
            self.fail(event, path, str(error))


def resolve(text: str) -> Any:
    """The value of a plain scalar by the core schema of YAML 1.2.

    Raises:
        ValueError: a number no setting can have: infinite, NaN or beyond range.
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        return parse_int(text)
    if _HEX.fullmatch(text):
        return parse_int(text, 0)
    if _FLOAT.fullmatch(text):
        return parse_float(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is no number a setting can have")
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        plain = resolve(value) == value
    except ValueError:
        plain = False
    style = None if plain else '"'
    if "\n" in value:
        style = "|" if value.replace("\n", "").isprintable() else '"'
    elif not value.isprintable():
        style = '"'
    return dumper.represent_scalar(f"{_CORE}str", value, style=style)


_Dumper.add_representer(str, _text)


def dump_yaml(value: Any) -> str:
    """YAML that ``parse_yaml`` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _mark(event: Event) -> Position:
    mark = event.start_mark
    if mark is None:
        return 1, 1
    return mark.line + 1, mark.column + 1


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
