"""First-fit-decreasing bin packing (Johnson 1973: at most 11/9 of the optimum plus 6/9 bins)."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, each bin's sizes summing to ``capacity`` at most.

    Each item goes into the first bin that has room, largest item first, ties in order. Items within a bin
    and bins among each other come back in the order of the items, so that packing keeps the data's order.

    Raises:
        ValueError: an item is larger than ``capacity``.
    """
    order, starts = packed(sizes, capacity)
    return [order[start:stop].tolist() for start, stop in itertools.pairwise(starts)]


def packed(sizes: Sequence[int], capacity: int) -> tuple[array[int], array[int]]:
    """As ``first_fit_decreasing``, for millions of items: 4 bytes an item, and as much while it works.

    Takes O(n log n): a tree over the bins holds the most room left in each subtree.

    Returns:
        Items, those of a bin together; and where each bin begins among them, with their number at the end.

    Raises:
        ValueError: an item is larger than ``capacity``.
    """
    if any(size > capacity for size in sizes):
        raise ValueError("an item is larger than the capacity")
    # two bins that are both at most half full would have been one
    leaves = 1 << min(len(sizes), 2 * sum(sizes) // max(1, capacity) + 1).bit_length()
    room = array("i", [capacity]) * (2 * leaves)
    bin_of = array("I", bytes(4 * len(sizes)))
    for index in _largest_first(sizes):
        size, node = sizes[index], 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        room[node] -= size
        bin_of[index] = node - leaves
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return _grouped(bin_of, leaves)


def _largest_first(sizes: Sequence[int]) -> array[int]:
    """Indices by falling size, ties in order: a counting sort."""
    counts: dict[int, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    place = 0
    places: dict[int, int] = {}
    for size in sorted(counts, reverse=True):
        places[size] = place
        place += counts[size]
    order = array("I", bytes(4 * len(sizes)))
    for index, size in enumerate(sizes):
        order[places[size]] = index
        places[size] += 1
    return order


def _grouped(bin_of: array[int], bins: int) -> tuple[array[int], array[int]]:
    """Items by bin; the bins by their first item."""
    number = array("i", [-1]) * bins
    counts = array("I")
    for node in bin_of:
        if number[node] < 0:
            number[node] = len(counts)
            counts.append(0)
        counts[number[node]] += 1
    starts = array("I", [0])
    for count in counts:
        starts.append(starts[-1] + count)
    order, place = array("I", bytes(4 * len(bin_of))), starts[:]
    for index, node in enumerate(bin_of):
        order[place[number[node]]] = index
        place[number[node]] += 1
    return order, starts
