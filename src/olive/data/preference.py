"""Preference rows to pairs of token sequences: the chosen answer and the rejected one, after one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from olive.config.workflow import PreProcess
from olive.data import formats
from olive.data.blocks import Blocks
from olive.data.chat import PLAIN, ChatTemplate
from olive.data.layout import Block
from olive.data.mixture import groups, name_of, scatter
from olive.data.spans import find
from olive.data.template import Text, bare, chat_of, each
from olive.data.tokens import IGNORE, Encoded, Tokenizer
from olive.errors import ConfigError, Problem, Severity, raise_errors

Row = Mapping[str, Any]


def check(pre: PreProcess, columns: Sequence[str]) -> list[Problem]:
    """Why rows cannot be read as pairs; ``pre`` is resolved."""
    if pre.format != "preference":
        found = f"format {pre.format}" if pre.format else "a template of the document's own"
        return [
            Problem(
                f"pairs of a chosen and a rejected answer are needed, and the rows are read by {found}",
                fix=f"set format to preference; it reads prompt, chosen, rejected; the data has "
                f"{formats.listing(columns)}",
            )
        ]
    if pre.train_on == "all":
        return [
            Problem("train_on is all, and of a pair the answers alone are compared", fix="leave train_on out")
        ]
    return formats.unfit(pre, columns)


def render(pre: PreProcess, row: Row, chat: ChatTemplate | None = None) -> tuple[Text, Text]:
    """The texts of prompt and chosen answer, and of prompt and rejected answer.

    Texts alone stay as they are where there is no chat template; else they are turns of user and assistant.

    Args:
        pre: resolved.
        row: column -> value.
        chat: the model's chat template.

    Raises:
        ConfigError: the row is no preference row, or the template does not render its prompt as the beginning
            of each text.
    """
    prompt, chosen, rejected = formats.sides(row)
    found = chat_of(pre, chat)
    if found is None and all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")):
        return bare(row["prompt"], row["chosen"]), bare(row["prompt"], row["rejected"])
    return _side(found or PLAIN, prompt, chosen), _side(found or PLAIN, prompt, rejected)


def _side(chat: ChatTemplate, prompt: formats.Turns, answer: formats.Turns) -> Text:
    turns = [*prompt, *answer]
    full, before = chat.render(turns), chat.render(prompt, add_generation_prompt=True)
    if not full.startswith(before):
        raise ConfigError(
            "the chat template does not render a prompt as the beginning of the prompt with its answer",
            fix="give another template as chat_template, or text without turns",
        )
    spans = tuple(span for span in find(chat, turns, full) if span.start >= len(before))
    if not spans:
        raise ConfigError("an answer has no assistant turn", fix="drop such rows")
    return Text(before, full[len(before) :], str(turns[-1].get("content")), spans)


def encode(texts: Sequence[tuple[Text, Text]], pre: PreProcess, tokenizer: Tokenizer) -> list[Block]:
    """Each pair as a block of two documents, the chosen one first; the answers alone have labels."""
    pre = pre.model_copy(update={"train_on": "completion"})
    encoded = tokenizer.encode_rows([side for pair in texts for side in pair], pre)
    return [_pair(*both) for both in zip(encoded[::2], encoded[1::2], strict=True)]


def _pair(chosen: Encoded, rejected: Encoded) -> Block:
    return Block(
        chosen.ids + rejected.ids, chosen.labels + rejected.labels, (len(chosen.ids), len(rejected.ids))
    )


def build(
    rows: Sequence[Row],
    pre: PreProcess,
    tokenizer: Tokenizer,
    seed: int | None = None,
    places: Sequence[int] | None = None,
) -> Blocks:
    """Render and tokenise preference rows; the strategy has no say, since pairs stay whole.

    Args:
        rows: column -> value.
        pre: format, chat template, ``max_seq_len`` of each of the two texts, ``max_samples``.
        tokenizer: of the model to train.
        seed: unused; as ``blocks.build``.
        places: numbers of the rows in the data, for messages.

    Raises:
        ConfigError: the rows are no preferences, or no pair has two different answers within ``max_seq_len``.
    """
    parts = groups(pre, rows)
    raise_errors(
        problem
        for part in parts
        for problem in check(part.pre, tuple(dict.fromkeys(name for row in part.rows for name in row)))
    )
    made = []
    for part in parts:
        texts = each(part.rows, lambda row, own=part.pre: render(own, row, tokenizer.chat))  # type: ignore[misc]
        made.append((part, encode(texts, part.pre, tokenizer)))
    named = []
    for index, pair in enumerate(scatter(len(rows), made)):
        name = name_of(rows[index], index if places is None else places[index])
        named.append(replace(pair, rows=(f"{name}, chosen", f"{name}, rejected")))
    return _fitting(named, pre)


def _fitting(pairs: Sequence[Block], pre: PreProcess) -> Blocks:
    """The pairs within ``max_seq_len`` that teach something."""
    limit = pre.max_seq_len
    kept, long, full, same = [], 0, 0, 0
    for pair in pairs:
        chosen, rejected = sides(pair)
        cut = _pair(*(Encoded(side.ids[:limit], side.labels[:limit]) for side in (chosen, rejected)))
        if any(all(label == IGNORE for label in side.labels[1:limit]) for side in (chosen, rejected)):
            full += 1
        elif chosen.ids[:limit] == rejected.ids[:limit]:
            same += 1
        else:
            long += cut.lengths != pair.lengths
            kept.append(replace(cut, rows=pair.rows))
    longest = max((max(pair.lengths) for pair in pairs), default=0)
    if not kept:
        raise _nothing(pairs, limit, longest, full)
    raising = f"set max_seq_len to {longest} to keep them whole"
    notes = [
        (full, f"are left out: their prompt alone fills max_seq_len {limit}", raising),
        (same, "are left out: the chosen answer is the rejected one", None),
        (long, f"are cut to max_seq_len {limit}; the longest text has {longest} tokens", raising),
    ]
    found = [
        Problem(f"{count} of {len(pairs)} pairs {what}", fix=fix, severity=Severity.WARNING)
        for count, what, fix in notes
        if count
    ]
    return Blocks(kept[: pre.max_samples], len(pairs), tuple(found))


def sides(pair: Block) -> tuple[Encoded, Encoded]:
    """The chosen and the rejected text of a pair."""
    middle = pair.lengths[0]
    return (
        Encoded(pair.ids[:middle], pair.labels[:middle]),
        Encoded(pair.ids[middle:], pair.labels[middle:]),
    )


def _nothing(pairs: Sequence[Block], limit: int, longest: int, full: int) -> ConfigError:
    if not full:
        return ConfigError(
            f"nothing would be learnt from {len(pairs)} pairs: the chosen answer of each is the rejected one",
            fix="check the columns chosen and rejected"
            + (f", or set max_seq_len to {longest}, the longest text" if longest > limit else ""),
        )
    return ConfigError(
        f"nothing would be learnt from {len(pairs)} pairs: "
        f"the prompt of {full} alone fills max_seq_len {limit}"
        + (f", and {len(pairs) - full} have the same answer twice" if full < len(pairs) else ""),
        fix=f"set max_seq_len to {longest}, the longest text, or less",
    )
