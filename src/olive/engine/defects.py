"""What a plan says where a pass itself raises: a defect of its developer's."""

from __future__ import annotations

from olive.config.workflow import PassEntry
from olive.errors import Problem


def defect(entry: PassEntry, method: str, error: BaseException) -> Problem:
    """The finding, by the method that raised."""
    return Problem(
        f"{entry.type}.{method} raised {type(error).__name__}: {error}",
        fix="Pass developer: yield Problems and return a Cost; never raise on valid parameters.",
        exit_code=3,
    )
