import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.config.workflow import PreProcess
from olive.data.split import split_rows
from olive.errors import ConfigError

some_rows = st.lists(
    st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.sampled_from(["x", "y"])}), min_size=2, max_size=60
)


@given(some_rows, st.floats(0.01, 0.9), st.integers(0, 5))
def test_the_parts_share_no_row_and_lose_none(rows: list[dict], share: float, seed: int) -> None:
    try:
        train, held = split_rows(rows, share, seed)
    except ConfigError:
        distinct = {(row["a"], row["b"]) for row in rows}
        assert len(distinct) < 2 or math.ceil(round(share * len(rows), 9)) >= len(rows)
        return
    assert train
    assert held
    assert not {(row["a"], row["b"]) for row in train} & {(row["a"], row["b"]) for row in held}
    for part in (train, held):
        position = iter(rows)
        assert all(any(row is other for other in position) for row in part)  # a subsequence: order is kept
    assert len(train) + len(held) == len(rows)
    assert (train, held) == split_rows(rows, share, seed)


@pytest.mark.parametrize(("size", "held"), [(0.3, 30), (0.001, 1), (17, 17), (1, 1), (0.07, 7)])
def test_sizes_of_distinct_rows_are_exact(size: float, held: int) -> None:
    rows = [{"n": n} for n in range(100)]
    assert len(split_rows(rows, size, 0)[1]) == held


def test_no_evaluation_part() -> None:
    rows = [{"n": 1}]
    assert split_rows(rows, 0, 0) == (rows, [])


def test_the_seed_matters_and_the_order_of_rows_does_not() -> None:
    rows = [{"n": n} for n in range(50)]
    one, other = split_rows(rows, 10, 1)[1], split_rows(rows, 10, 2)[1]
    assert one != other
    backwards = split_rows(rows[::-1], 10, 1)[1]
    assert sorted(row["n"] for row in backwards) == sorted(row["n"] for row in one)


@pytest.mark.parametrize("size", [2, 5, 0.99, -1])
def test_an_impossible_size_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match="eval_dataset_size"):
        split_rows([{"n": 1}, {"n": 2}], size, 0)


def test_all_rows_alike_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="1 distinct"):
        split_rows([{"n": 1}] * 10, 0.3, 0)


def test_rows_of_one_text_stay_together() -> None:
    rows = [{"id": n, "text": f"text {n // 2}"} for n in range(40)]
    train, held = split_rows(rows, 0.3, 0, PreProcess())
    assert not {row["text"] for row in train} & {row["text"] for row in held}
    assert len(held) == 12


def test_the_template_alone_changes_no_split() -> None:
    rows = [{"id": n, "text": f"text {n}"} for n in range(40)]
    assert split_rows(rows, 0.3, 7) == split_rows(rows, 0.3, 7, PreProcess())


def test_a_split_stays_the_same_over_versions() -> None:
    assert [row["n"] for row in split_rows([{"n": n} for n in range(10)], 0.3, 0)[1]] == [3, 8, 9]
