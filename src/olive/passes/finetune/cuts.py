"""How the rows of an optimizer step become forward passes, on one device or on several. No torch.

The loss is a sum over label tokens divided by their number in the whole optimizer step, so how its rows are
cut into forward passes, and who does which, does not change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_SLACK = 1.02  # over the budget before a forward pass is cut


def share(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Rows shared out so that each part has about as many tokens; longest first to whoever has least.

    Args:
        lengths: tokens of each row.
        parts: how many parts; some stay empty where there are fewer rows.

    Returns:
        The rows of each part, in order.
    """
    made: list[list[int]] = [[] for _ in range(parts)]
    weights = [0] * parts
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(parts), key=lambda part: (weights[part], part))
        made[lightest].append(row)
        weights[lightest] += lengths[row]
    return [sorted(part) for part in made]


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in as few forward passes as ``budget`` tokens each allow, of about the same size.

    A row is never cut: one longer than the budget has a pass of its own.
    """
    if not lengths:
        return []
    parts = max(1, math.ceil(sum(lengths) / (budget * _SLACK)))
    while True:
        made = share(lengths, parts)
        if all(len(part) < 2 or sum(lengths[i] for i in part) <= budget * _SLACK for part in made):
            return [part for part in made if part]
        parts += 1
