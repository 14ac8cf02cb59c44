"""Names in a document: of nodes, operators and values of a graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches

from olive.errors import PassFailed, Problem, Severity
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
        fits = _fits(name, known)
        if not fits:
            raise PassFailed(f"{graph.path.name} has no {what} {name!r}", fix=_close(name, known))
        found |= fits
    return [one for one in known if one in found]


def unknown(
    file: str, known: Collection[str], what: str, given: Mapping[str, Iterable[str] | None]
) -> Iterator[Problem]:
    """Names that the input graph does not have; warnings, since an earlier pass may make them.

    Args:
        file: of the graph.
        known: names of the graph.
        what: what they are names of.
        given: parameter -> names.
    """
    for parameter, names in given.items():
        for name in names or ():
            if not _fits(name, known):
                yield Problem(
                    f"{file} has no {what} {name!r}",
                    where=parameter,
                    fix=_close(name, known),
                    severity=Severity.WARNING,
                )


def _fits(name: str, known: Collection[str]) -> set[str]:
    if name in known:
        return {name}
    if not set(name) & {"*", "?"}:
        return set()
    pattern = re.compile(re.escape(name).replace(r"\*", ".*").replace(r"\?", "."))
    return {one for one in known if pattern.fullmatch(one)}


def _close(name: str, known: Collection[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]}?" if close else f"It has {', '.join(sorted(known)[:8])} ..."
