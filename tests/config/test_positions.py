from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olive.config.loader import dumps
from olive.config.positions import parse, show
from olive.errors import ConfigError

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def test_positions_of_json() -> None:
    document = parse('{\n  "a": [1,\n    {"b c": 2}]\n}', "f.json")
    assert document.value == {"a": [1, {"b c": 2}]}
    assert document.positions[("a",)] == (2, 3)
    assert document.positions[("a", 1)] == (3, 5)
    assert document.where(("a", 1, "b c")) == 'f.json:3: $.a[1]["b c"]'
    assert document.where(("a", 1, "absent")) == "f.json:3: $.a[1].absent"


def test_positions_of_yaml() -> None:
    document = parse("a:\n  - 1\n  - b: 1e-4\n    on: yes\n", "f.yaml")
    assert document.value == {"a": [1, {"b": 1e-4, "on": "yes"}]}
    assert document.positions[("a", 1, "b")] == (3, 5)
    assert show(("a", 1, "b")) == "$.a[1].b"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ('{"a": 1, "a": 2}', "f.json", "given twice"),
        ("a: 1\na: 2", "f.yaml", "given twice"),
        ('{"a": NaN}', "f.json", "NaN"),
        ('{"a": -Infinity}', "f.json", "-Infinity"),
        ('{"a": 1e999}', "f.json", "beyond the range"),
        ('{"a": 99999999999999999999}', "f.json", "beyond the range"),
        ("a: .nan", "f.yaml", ".nan"),
        ("a: 1e999", "f.yaml", "beyond the range"),
        ("[" * 200, "f.json", "nested deeper"),
        ("[" * 200, "f.yaml", "nested deeper"),
        ('{"a": 1,}', "f.json", "double quotes"),
        ("{'a': 1}", "f.json", "double quotes"),
        ('{"a": tru}', "f.json", "no JSON value"),
        ('{"a": 1} x', "f.json", "after the end"),
        ('{"a": "x', "f.json", "string"),
        ('{"a": "\\ud800"}', "f.json", "surrogate"),
        ('// x\n{"a": 1}', "f.json", "no comments"),
        ('{"a" 1}', "f.json", "colon"),
        ('{"a": 1 "b": 2}', "f.json", "comma"),
        ("[1 2]", "f.json", "comma"),
        ("", "f.json", "too early"),
        ("", "f.yaml", "empty"),
        ("a: [1", "f.yaml", "no YAML"),
        ("a: !!python/object:os.system x", "f.yaml", "tag"),
        ("a: *b", "f.yaml", "refers to nothing"),
        ("a: 1\n---\nb: 2", "f.yaml", "second document"),
        ("? [a]\n: 1", "f.yaml", "key must be text"),
        ("a: \x07", "f.yaml", "no YAML"),
    ],
)
def test_refused(text: str, name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        parse(text, name)
    assert caught.value.problems[0].where is not None


def test_aliases_are_counted() -> None:
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for name, before in zip("bcdefgh", "abcdefg", strict=True):
        text += f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
    with pytest.raises(ConfigError, match="more than"):
        parse(text, "bomb.yaml")
    assert parse("a: &a {b: 1}\nc: {<<: *a, d: 2}\n", "f.yaml").value["c"] == {"b": 1, "d": 2}


@given(VALUES)
@settings(deadline=None)
def test_json_agrees_with_the_standard_reader(value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    assert parse(text, "f.json").value == value


@given(st.dictionaries(TEXT, VALUES, max_size=4))
@settings(deadline=None)
def test_yaml_round_trip(value: dict[str, Any]) -> None:
    assert parse(dumps(value, "yaml"), "f.yaml").value == value


@given(st.text(max_size=60) | st.text('{}[]",:\\ \n-&*?|>!%@`#1e.', max_size=40))
@settings(deadline=None)
def test_garbage_is_refused_or_read(text: str) -> None:
    for name in ("f.json", "f.yaml", "f"):
        try:
            parse(text, name)
        except ConfigError:
            continue
