"""Which setting each layer gets under a budget of bytes: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence


def choose(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> tuple[int, ...] | None:
    """The options of least total loss within a budget.

    Dynamic programming over the items that keeps the states no other beats in both bytes and loss. Sizes
    of matrices share a large common divisor, so that there are at most budget / divisor of them.

    Args:
        options: of each item, its (bytes, loss).
        budget: bytes of all items together.

    Returns:
        Number of the option taken for each item; None where even the smallest do not fit.
    """
    least = [min(size for size, _ in item) for item in options]
    rest = sum(least)
    if rest > budget:
        return None
    states: list[tuple[int, float]] = [(0, 0.0)]
    steps: list[list[tuple[int, int]]] = []
    for item, smallest in zip(options, least, strict=True):
        rest -= smallest
        reached = sorted(
            (size + more, loss + worse, place, number)
            for place, (size, loss) in enumerate(states)
            for number, (more, worse) in enumerate(item)
            if size + more + rest <= budget
        )
        states, step = [], []
        for size, loss, place, number in reached:
            if not states or loss < states[-1][1]:
                states.append((size, loss))
                step.append((place, number))
        steps.append(step)
    taken: list[int] = []
    place = len(states) - 1
    for step in reversed(steps):
        place, number = step[place]
        taken.append(number)
    return tuple(reversed(taken))
