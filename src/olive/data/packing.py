"""First-fit-decreasing bin packing (Johnson 1973: at most 11/9 of the optimum plus 6/9 bins)."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of item indices, each bin's sizes summing to ``capacity`` at most.

    Each item goes into the first bin that has room, largest item first, ties in order. Items within a bin
    and bins among each other come back in the order of the items, so that packing keeps the data's order.
    Takes O(n log n): a tree over the bins holds the most room left in each subtree.

    Raises:
        ValueError: an item is larger than ``capacity``.
    """
    if any(size > capacity for size in sizes):
        raise ValueError("an item is larger than the capacity")
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    bins: dict[int, list[int]] = {}
    for index in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < sizes[index]:
                node += 1
        room[node] -= sizes[index]
        bins.setdefault(node, []).append(index)
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return sorted((sorted(items) for items in bins.values()), key=lambda items: items[0])
