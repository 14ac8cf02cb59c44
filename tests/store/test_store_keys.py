from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.errors import InternalError
from olive.store.keys import canonical, difference, key
from olive.store.store import Store

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
parts_of = st.dictionaries(st.text(), json_values, max_size=4)


def test_golden_key() -> None:
    parts = {"pass": "LoRA", "params": {"r": 64, "dropout": 0.05, "modules": ["q", "v"]}, "note": "é"}
    text = '{"note":"\\u00e9","params":{"dropout":0.05,"modules":["q","v"],"r":64},"pass":"LoRA"}'
    assert canonical(parts) == text
    assert key(parts) == hashlib.sha256(text.encode()).hexdigest()


@given(parts_of)
def test_order_does_not_matter(parts: dict[str, Any]) -> None:
    assert key(dict(reversed(parts.items()))) == key(parts)
    assert difference(parts, parts) == []


@given(parts_of, parts_of)
def test_keys_differ_exactly_where_a_difference_is_named(one: dict[str, Any], two: dict[str, Any]) -> None:
    if difference(one, two):
        assert key(one) != key(two)
    assert {item.label for item in difference(one, two)} == {item.label for item in difference(two, one)}


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, Path("x"), b"x", object()])
def test_only_json_makes_a_key(value: object) -> None:
    with pytest.raises(InternalError, match="JSON"):
        key({"part": value})


def test_difference_names_the_part() -> None:
    before = {
        "pass": {"name": "LoRA", "source": "aa"},
        "params": {"r": 8, "alpha": 16},
        "versions": {"torch": "2"},
    }
    after = {
        "pass": {"name": "LoRA", "source": "bb"},
        "params": {"r": 64},
        "versions": {"torch": "2", "peft": "1"},
    }
    assert [str(item) for item in difference(before, after)] == [
        "params.alpha: 16 -> (absent)",
        "params.r: 8 -> 64",
        'pass.source: "aa" -> "bb"',
        'versions.peft: (absent) -> "1"',
    ]


@pytest.mark.parametrize(
    "text", ["", "..", "../" * 10, "0" * 63, "0" * 65, "A" * 64, "g" * 64, "/" + "0" * 63]
)
def test_a_key_names_no_folder_outside_the_store(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    for use in (store.lookup, store.journal, store.remove):
        with pytest.raises(InternalError, match="no cache key"):
            use(text)
