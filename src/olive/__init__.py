"""One document in, the best small model for your device out.

``olive.run(document)`` does everything ``olive run`` does and returns its result; ``olive.plan(document)``
says what would be done. Both import nothing heavy until they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olive.workflows import plan, run

__all__ = ["plan", "run"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from olive import workflows

        return getattr(workflows, name)
    raise AttributeError(f"module 'olive' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
