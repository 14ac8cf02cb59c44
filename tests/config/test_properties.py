"""A misspelt key is one problem wherever it stands; garbage is a ConfigError and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from documents import DOCUMENT_A, DOCUMENT_C, document_b, load_document
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from olive.config.positions import parse
from olive.errors import ConfigError, Severity

Path = tuple[str | int, ...]
DOCUMENTS = {"A": DOCUMENT_A, "B": document_b(), "C": DOCUMENT_C}
# Below these the keys are names that the author chose.
FREE = {("systems",), ("passes",), ("evaluators",)}


def keys(value: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(value, dict):
        for key, child in value.items():
            free = path in FREE or (path == ("data_configs",) and isinstance(value, dict))
            if not free:
                yield (*path, key)
            yield from keys(child, (*path, key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from keys(child, (*path, index))


CASES = [(name, path) for name, document in DOCUMENTS.items() for path in keys(document)]


@st.composite
def misspellings(draw: st.DrawFn) -> tuple[str, Path, str]:
    name, path = draw(st.sampled_from(CASES))
    return name, path, draw(misspelt(str(path[-1])))


@st.composite
def misspelt(draw: st.DrawFn, key: str) -> str:
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    kind = draw(st.sampled_from(["drop", "double", "swap", "insert", "replace"]))
    if kind == "swap" and at + 1 < len(key):
        return key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    if kind == "drop" and len(key) > 2:
        return key[:at] + key[at + 1 :]
    if kind == "replace" and len(key) > 2:
        return key[:at] + letter + key[at + 1 :]
    return key[:at] + (key[at] if kind == "double" else letter) + key[at:]


def renamed(document: dict[str, Any], path: Path, new: str) -> dict[str, Any]:
    found = copy.deepcopy(document)
    node: Any = found
    for part in path[:-1]:
        node = node[part]
    members = {new if key == path[-1] else key: value for key, value in node.items()}
    node.clear()
    node.update(members)
    return found


@given(misspellings())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_misspelt_key_is_one_problem(case: tuple[str, Path, str]) -> None:
    name, path, new = case
    document = DOCUMENTS[name]
    node: Any = document
    for part in path[:-1]:
        node = node[part]
    if new in node:
        return
    with pytest.raises(ConfigError) as caught:
        load_document(renamed(document, path, new))
    errors = [problem for problem in caught.value.problems if problem.severity is Severity.ERROR]
    assert len(errors) == 1, (path, new, errors)
    assert new in errors[0].message
    assert (errors[0].where or "").endswith(f".{new}")
    assert "did you mean" in (errors[0].fix or ""), errors


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.sampled_from(["LoRA", "LocalSystem", "HfModel", "train", "cpu", "steps", ""])
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted({str(path[-1]) for _, path in CASES} | {"x", "lora", "local_system"})),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_garbage_is_a_config_error(value: Any) -> None:
    try:
        load_document(value if isinstance(value, dict) else {"passes": value})
    except ConfigError:
        return


@given(st.sampled_from(CASES), JSON)
@settings(max_examples=400, deadline=None)
def test_a_document_with_garbage_inside(case: tuple[str, Path], value: Any) -> None:
    name, path = case
    found = copy.deepcopy(DOCUMENTS[name])
    node: Any = found
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    try:
        loaded = load_document(found)
    except ConfigError as error:
        assert all(problem.where for problem in error.problems)  # noqa: PT017 - either outcome is right
        return
    again = load_document(loaded.document)
    assert again.workflow == loaded.workflow
    assert again.document == loaded.document


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], True])
def test_a_file_that_is_no_object(value: Any, tmp_path: Any) -> None:
    import json

    file = tmp_path / "f.json"
    file.write_text(json.dumps(value))
    with pytest.raises(ConfigError):
        load_document(file)
    assert parse(file.read_text(), "f.json").value == value


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": object()}, {"a": float("nan")}, {"a": 10**30}, {"a": "\ud800"}]
)
def test_mappings_that_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ConfigError):
        load_document(value)


def test_a_mapping_that_holds_itself() -> None:
    value: dict[str, Any] = {}
    value["passes"] = value
    with pytest.raises(ConfigError):
        load_document(value)
