"""The assistant's turns of a rendered text to labels, token by token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from olive.data.spans import Span
from olive.data.template import Text
from olive.errors import ConfigError

IGNORE = -100
Offsets = Sequence[tuple[int, int]]


def label(
    text: Text, ids: Sequence[int], offsets: Offsets, special: Collection[int]
) -> tuple[list[int], bool]:
    """Labels of a text whose spans alone are learnt.

    A turn begins with the first token that begins where generation would begin, or later, and ends with the
    first special token after its words; where there is none, with all that the template writes before the
    next turn. Marks of the template say the end themselves, but for a special token right behind them.

    Args:
        text: the text, with spans.
        ids: its tokens.
        offsets: characters of the whole text that each token stands for; together they leave none out.
        special: ids of special tokens.

    Returns:
        The ids, with ``-100`` outside the turns; and whether EOS is still to come: the last turn ends the
        text, and no special token ends it.

    Raises:
        ConfigError: a token holds both the end of what the template writes before an answer and the
            beginning of the answer.
    """
    labels = [IGNORE] * len(ids)
    starts = [start for start, _ in offsets]
    last, closed = 0, True
    for span in text.spans or ():
        first = bisect_left(starts, span.start)
        _check_start(text, span, offsets[first - 1][1] if first else 0)
        last = max(first, bisect_left(starts, span.words))
        closing = _closing(text, ids, starts, special, span, first, last)
        closed = closing is not None
        if closing is not None:
            last = max(last, closing + 1)
        elif not span.marked:
            while last < len(ids) and offsets[last][1] <= span.stop:
                last += 1
        labels[first:last] = ids[first:last]
    behind = text.full[text.spans[-1].stop :] if text.spans else ""
    return labels, not closed and not behind.strip()


def _closing(
    text: Text,
    ids: Sequence[int],
    starts: Sequence[int],
    special: Collection[int],
    span: Span,
    first: int,
    last: int,
) -> int | None:
    """The special token that ends a turn whose words are the tokens ``first`` to ``last``; None if none."""
    if span.marked:
        inside = span.start + len(text.full[span.start : span.words].rstrip())
        final = bisect_left(starts, inside) - 1
        if final >= first and ids[final] in special:
            return final
        return last if last < len(ids) and starts[last] == span.words and ids[last] in special else None
    after = range(last, bisect_left(starts, span.stop))
    return next((place for place in after if ids[place] in special), None)


def _check_start(text: Text, span: Span, before: int) -> None:
    """The token before an answer ends where the answer begins; an answer's own first space may join it."""
    if before > span.start and span.start < span.words and not text.full[span.start].isspace():
        around = text.full[max(0, span.start - 12) : span.start + 12]
        raise ConfigError(
            "the tokenizer joins the end of what the chat template writes before an answer and the answer's "
            "beginning to one token, which generation would never see",
            fix=f"end it with a special token or a line end, not with a space; it is about {around!r}",
        )
