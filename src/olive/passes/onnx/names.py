"""Names in a document: of nodes, operators and values of a graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from olive.errors import PassFailed
from olive.passes.onnx.graphs import Graph


def named(given: Iterable[str], known: Collection[str], what: str, graph: Graph) -> list[str]:
    """What the document names, in the order of the graph.

    Args:
        given: names; ``*`` and ``?`` stand for any characters, and for one.
        known: names of the graph.
        what: what they are names of, for messages.
        graph: for messages.

    Raises:
        PassFailed: one is not the graph's, or a pattern fits none; the message has the closest.
    """
    found: set[str] = set()
    for name in given:
        if name in known:
            found.add(name)
            continue
        pattern = re.escape(name).replace(r"\*", ".*").replace(r"\?", ".")
        fits = {one for one in known if re.fullmatch(pattern, one)} if pattern != re.escape(name) else set()
        if not fits:
            close = get_close_matches(name, list(known), n=1)
            raise PassFailed(
                f"{graph.path.name} has no {what} {name!r}",
                fix=f"Did you mean {close[0]}?" if close else f"It has {', '.join(sorted(known)[:8])} ...",
            )
        found |= fits
    return [one for one in known if one in found]
