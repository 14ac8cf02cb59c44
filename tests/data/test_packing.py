import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.data.packing import first_fit_decreasing


def naive(sizes: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        for items in bins:
            if sum(sizes[item] for item in items) + sizes[index] <= capacity:
                items.append(index)
                break
        else:
            bins.append([index])
    return sorted(sorted(items) for items in bins)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_the_tree_gives_what_the_plain_algorithm_gives(sizes: list[int], capacity: int) -> None:
    assert first_fit_decreasing(sizes, capacity) == naive(sizes, capacity)


def test_an_item_that_fits_no_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than the capacity"):
        first_fit_decreasing([3, 9], 8)


def test_many_items_take_little_time() -> None:
    generator = random.Random(0)
    sizes = [generator.randint(1, 2048) for _ in range(50_000)]
    begin = time.process_time()
    bins = first_fit_decreasing(sizes, 2048)
    assert time.process_time() - begin < 5
    assert len(bins) <= 1.02 * sum(sizes) / 2048
