"""Where in a rendered conversation the assistant speaks, found from the template's own renderings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olive.data.chat import BEGIN, END, ChatTemplate
from olive.errors import ConfigError

_STAND_IN = "\ufdd2"  # a character that no text holds, in place of a turn's content


@dataclass(frozen=True, slots=True)
class Span:
    """One turn of the assistant, in characters of the whole text; ``start <= words <= stop``.

    Attributes:
        start: where generation would begin.
        words: where the turn's content ends and the template's end of the turn begins.
        stop: where the turn is over at the latest: the next turn begins, or the text ends.
        marked: the template itself marks this span, its end included.
    """

    start: int
    words: int
    stop: int
    marked: bool = False


def find(chat: ChatTemplate, turns: Sequence[Mapping[str, Any]], full: str) -> tuple[Span, ...]:
    """The assistant's turns in ``full``, which is the rendering of ``turns``.

    With ``{% generation %}`` marks the template says it. Else the start of a turn is the length of the
    rendering of the turns before it with the generation prompt, which must be a prefix of the whole; where
    its content ends is told by a rendering that has a stand-in for the content; and where the turn is over
    by how far what follows is what would follow at the end of a conversation.

    Raises:
        ConfigError: the template does not render the turns before an answer as a prefix of the whole, uses
            an answer twice or not at all, or the content of an answer is not text.
    """
    if chat.marks:
        return _marked(chat, turns, full)
    return tuple(
        _span(chat, turns, index, full) for index, turn in enumerate(turns) if turn.get("role") == "assistant"
    )


def _marked(chat: ChatTemplate, turns: Sequence[Mapping[str, Any]], full: str) -> tuple[Span, ...]:
    pieces = chat.render(turns, marked=True).split(BEGIN)
    spans, place = [], len(pieces[0])
    read = pieces[0]
    for piece in pieces[1:]:
        words, found, after = piece.partition(END)
        if not found or END in after:
            raise _unstable("its {% generation %} blocks lie in one another, or the text holds their marks")
        spans.append(Span(place, place + len(words), place + len(words), marked=True))
        place += len(words) + len(after)
        read += words + after
    if read != full:
        raise _unstable("with its {% generation %} blocks marked it renders another text")
    return tuple(spans)


def _span(chat: ChatTemplate, turns: Sequence[Mapping[str, Any]], index: int, full: str) -> Span:
    turn = turns[index]
    if not isinstance(turn.get("content"), str):
        raise ConfigError(
            "the content of an assistant turn is not text, so that its place in the rendering is not known",
            fix="set train_on to all, or mark the assistant's words in the template: {% generation %}",
        )
    probe = chat.render([*turns[:index], {**turn, "content": _STAND_IN}, *turns[index + 1 :]])
    before, _, after = probe.partition(_STAND_IN)
    words = len(full) - len(after)
    if probe.count(_STAND_IN) != 1 or not full.endswith(after):
        raise _unstable(f"it does not render the answer of turn {index} once, as it is")
    start = _start(chat, turns[:index], before, full)
    if start > words:
        raise _unstable(f"it begins the answer of turn {index} behind where it ends")
    stop = len(full)
    if index < len(turns) - 1:
        ending = chat.render([*turns[:index], {**turn, "content": _STAND_IN}]).partition(_STAND_IN)[2]
        stop = words + len(os.path.commonprefix([ending, after]))  # noqa: RUF071 - characters are meant
    return Span(start, words, stop)


def _start(chat: ChatTemplate, earlier: Sequence[Mapping[str, Any]], before: str, full: str) -> int:
    """Where generation begins after the turns ``earlier``; ``before`` is what the template puts first."""
    if earlier:
        prompt = chat.render(earlier, add_generation_prompt=True)
        if not full.startswith(prompt):
            raise _unstable(
                f"the rendering of turns 0 to {len(earlier) - 1} with the generation prompt is no prefix of "
                f"the whole"
            )
        knows_no_prompt = len(prompt) < len(before) and prompt == chat.render(earlier)
        if not (knows_no_prompt and full.startswith(before)):
            return len(prompt)
    if not full.startswith(before):
        raise _unstable("it renders what comes before an answer otherwise when the answer is another")
    return len(before)


def _unstable(what: str) -> ConfigError:
    return ConfigError(
        f"where the assistant speaks cannot be told from the chat template: {what}",
        fix="mark the assistant's words in the template with {% generation %} and {% endgeneration %}, give "
        "another one as chat_template, or set train_on to completion or all",
    )
