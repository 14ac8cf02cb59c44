"""Keys: what a result was made of, as one number, and how two such lists differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from olive.errors import InternalError

_KEY = re.compile(r"[0-9a-f]{64}")
_ABSENT = "(absent)"


def canonical(value: Any) -> str:
    """One spelling a JSON value: sorted keys, no spaces, no NaN.

    Raises:
        InternalError: the value is no JSON, or holds NaN or infinity.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InternalError(f"a cache key can only be made of JSON values: {error}") from error


def key(parts: Mapping[str, Any]) -> str:
    """The cache key of a step: sha256 of the canonical JSON of its labelled parts, 64 hex digits.

    Raises:
        InternalError: a part is no JSON.
    """
    return hashlib.sha256(canonical(dict(parts)).encode()).hexdigest()


def require_key(text: str) -> str:
    """``text`` if it is a key; so that no key can name a folder outside the store.

    Raises:
        InternalError: it is not 64 hex digits.
    """
    if not _KEY.fullmatch(text):
        raise InternalError(f"{text!r} is no cache key: 64 hex digits are")
    return text


@dataclass(frozen=True, slots=True)
class Difference:
    """One part in which two results differ.

    Attributes:
        label: where, e.g. ``params.r``.
        before: its value in the first, or ``(absent)``.
        after: its value in the second, or ``(absent)``.
    """

    label: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.label}: {_brief(self.before)} -> {_brief(self.after)}"


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Every labelled part in which two results differ, in order of the label."""
    first, second = dict(_leaves("", dict(before))), dict(_leaves("", dict(after)))
    return [
        Difference(label, first.get(label, _ABSENT), second.get(label, _ABSENT))
        for label in sorted(first.keys() | second.keys())
        if label not in first or label not in second or canonical(first[label]) != canonical(second[label])
    ]


def _leaves(label: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{label}.{name}" if label else str(name), inner)
    else:
        yield label, value


def _brief(value: Any) -> str:
    if value == _ABSENT:
        return _ABSENT
    text = canonical(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
