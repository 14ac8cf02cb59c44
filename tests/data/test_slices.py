import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.data.slices import Slice, parse_split, take


def test_grammar() -> None:
    assert parse_split("train") == (Slice("train"),)
    assert parse_split("train[:10%]+test[5:]") == (Slice("train", None, 10, True), Slice("test", 5))
    assert parse_split("validation.v2[-3:]") == (Slice("validation.v2", -3),)


@pytest.mark.parametrize(
    "text", ["", "train[", "train[5]", "train[:10%](pct1_dropremainder)", "train[:200%]", "a b"]
)
def test_what_is_no_split(text: str) -> None:
    assert parse_split(text) is None


@given(st.integers(0, 300), st.integers(0, 100), st.integers(0, 100))
def test_percentages_partition_as_in_datasets(count: int, first: int, second: int) -> None:
    low, high = sorted((first, second))
    items = list(range(count))
    parts = [take(items, Slice("s", *bounds, True)) for bounds in ((0, low), (low, high), (high, 100))]
    assert [item for part in parts for item in part] == items


@pytest.mark.parametrize(
    "text", ["train[:10%]", "train[33%:66%]", "train[-7:]", "train[3:9]", "train[:5]+train[95%:]"]
)
def test_slices_equal_those_of_datasets(text: str) -> None:
    arrow_reader = pytest.importorskip("datasets.arrow_reader")
    instruction = arrow_reader.ReadInstruction.from_spec(text).to_absolute({"train": 97})
    items = list(range(97))
    expected = [item for part in instruction for item in items[part.from_ : part.to]]
    assert [item for part in parse_split(text) or () for item in take(items, part)] == expected
