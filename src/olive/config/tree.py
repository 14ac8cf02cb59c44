"""A document that remembers where each part of it was written, however it is moved about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from os import PathLike, fspath
from typing import Any

from olive.config.positions import MAX_DEPTH, MAX_INT, MAX_VALUES, Document, JsonPath, is_text, show
from olive.errors import ConfigError, Problem, Severity


@dataclass(slots=True)
class Node:
    """One value and where it stood in the source.

    Attributes:
        value: a dict of nodes, a list of nodes, or a scalar.
        origin: its JSON path in the source.
    """

    value: Any
    origin: JsonPath

    @property
    def members(self) -> dict[str, Node]:
        """The members when this is an object, else none (a new dict)."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Node]:
        """The items when this is a list, else none (a new list)."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value

    def at(self, path: JsonPath) -> Node:
        """The deepest existing node along ``path``."""
        node = self
        for part in path:
            child = node.child(part)
            if child is None:
                return node
            node = child
        return node

    def child(self, part: str | int) -> Node | None:
        """One step down, or None."""
        if isinstance(self.value, dict) and isinstance(part, str):
            return self.value.get(part)
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            return self.items[part]
        return None

    def walk(self) -> Iterator[Node]:
        """This node and everything below it."""
        yield self
        for child in self.value.values() if isinstance(self.value, dict) else self.items:
            yield from child.walk()


def grow(value: Any, origin: JsonPath = ()) -> Node:
    """A tree over plain values."""
    if isinstance(value, dict):
        return Node({key: grow(item, (*origin, key)) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return Node([grow(item, (*origin, index)) for index, item in enumerate(value)], origin)
    return Node(value, origin)


def from_mapping(source: Mapping[str, Any]) -> Document:
    """A document given as Python values: copied, and held to what JSON can say.

    Raises:
        ConfigError: a key that is no string, a value that JSON cannot hold, NaN, or nesting without end.
    """
    return Document(_jsonable(source, (), [0]))


def _jsonable(value: Any, path: JsonPath, count: list[int]) -> Any:
    count[0] += 1
    if len(path) > MAX_DEPTH or count[0] > MAX_VALUES:
        raise ConfigError(
            f"deeper than {MAX_DEPTH} levels or more than {MAX_VALUES} values", where=show(path[:8])
        )
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str) or not is_text(key):
                raise ConfigError(f"the key {key!r} is no text", where=show(path))
            found[key] = _jsonable(item, (*path, key), count)
        return found
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, (*path, index), count) for index, item in enumerate(value)]
    return _scalar(value, path)


def _scalar(value: Any, path: JsonPath) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, PathLike):
        value = str(fspath(value))
    wrong = None
    if isinstance(value, float) and not math.isfinite(value):
        wrong = f"{value} is no number a setting can have"
    elif isinstance(value, int) and abs(value) > MAX_INT:
        wrong = "a whole number beyond 64 bits is no setting"
    elif isinstance(value, str) and not is_text(value):
        wrong = "a string with half of a surrogate pair is no text"
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        wrong = f"a {type(value).__name__} is nothing a document can hold"
    if wrong is not None:
        raise ConfigError(wrong, where=show(path))
    return value


@dataclass(slots=True)
class Findings:
    """What the loader found, in order; equal messages are told once, at their first place."""

    document: Document
    problems: list[Problem] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def note(self, message: str, origin: JsonPath, fix: str | None = None) -> None:
        """A rewrite, or a key without effect."""
        self._add(message, origin, fix, Severity.NOTE)

    def warn(self, message: str, origin: JsonPath, fix: str | None = None) -> None:
        """Something that probably is not what the author meant."""
        self._add(message, origin, fix, Severity.WARNING)

    def error(self, message: str, origin: JsonPath, fix: str | None = None) -> None:
        """Something that must be changed. Every place is reported."""
        problem = Problem(message, self.document.where(origin), fix)
        if problem not in self.problems:
            self.problems.append(problem)

    def _add(self, message: str, origin: JsonPath, fix: str | None, severity: Severity) -> None:
        if message not in self._said:
            self._said.add(message)
            self.problems.append(Problem(message, self.document.where(origin), fix, severity))

    @property
    def failed(self) -> bool:
        """Whether anything found stops the run."""
        return any(problem.severity is Severity.ERROR for problem in self.problems)
