"""Did you mean ...: the known name nearest to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, or None when none is near.

    Case, ``-`` for ``_`` and blanks do not count; a swap of neighbours, one letter too many or too few count
    little; the order of ``known`` breaks ties.
    """
    folded = _fold(name)
    best: tuple[float, str] | None = None
    for candidate in known:
        score = _likeness(folded, _fold(candidate))
        if best is None or score > best[0]:
            best = (score, candidate)
    return best[1] if best is not None and best[0] >= 0.6 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The fix for an unknown name: the nearest known one, else all of them."""
    names = list(dict.fromkeys(known))
    found = closest(name, names)
    if found is not None:
        return f"did you mean `{found}`?"
    return f"known here: {', '.join(names)}" if names else "remove it"


def _fold(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _likeness(left: str, right: str) -> float:
    if left == right:
        return 1.0
    ratio = SequenceMatcher(None, left, right, autojunk=False).ratio()
    edits = _distance(left, right)
    # One edit is a slip of the finger even in a short name, where the ratio is harsh.
    return max(ratio, 0.8 - 0.1 * edits) if edits <= 1 + len(right) // 8 else ratio


def _distance(left: str, right: str) -> int:
    """Edits between two names, a swap of neighbours counting one (optimal string alignment)."""
    if abs(len(left) - len(right)) > 3:
        return 9
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, char in enumerate(left, 1):
        current = [i]
        for j, other in enumerate(right, 1):
            cost = min(row[j] + 1, current[-1] + 1, row[j - 1] + (char != other))
            if i > 1 and j > 1 and char == right[j - 2] and left[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, row = row, current
    return row[-1]
