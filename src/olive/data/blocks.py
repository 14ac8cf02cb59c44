"""Encoded rows to the blocks a model is trained on: the strategies."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from olive.config.workflow import PreProcess
from olive.data.mixture import groups, scatter
from olive.data.packing import first_fit_decreasing
from olive.data.template import render_all
from olive.data.tokens import IGNORE, Encoded, Tokenizer
from olive.errors import ConfigError, Problem, Severity


@dataclass(frozen=True, slots=True)
class Block:
    """One training sequence.

    Attributes:
        ids: token ids.
        labels: the ids, with ``-100`` where nothing is learnt. Not shifted: the label at ``i`` is the target
            of the logits at ``i - 1``, and the first label of a document has no logits of its own.
        lengths: lengths of the documents inside, in order; their sum is ``len(ids)``. Attention stays
            within a document and positions restart at each.
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]

    @property
    def positions(self) -> list[int]:
        """Position ids, restarting at each document."""
        return [position for length in self.lengths for position in range(length)]

    @property
    def trained_tokens(self) -> int:
        """How many positions carry a loss."""
        firsts = {0, *accumulate(self.lengths)}
        return sum(label != IGNORE and index not in firsts for index, label in enumerate(self.labels))


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of a dataset, never none.

    Attributes:
        blocks: the blocks.
        rows: number of rows they were made from.
        notes: what the user should know: rows cut, rows left out, a tail dropped.
    """

    blocks: list[Block]
    rows: int
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        return sum(len(block.ids) for block in self.blocks)

    @property
    def trained_tokens(self) -> int:
        """Positions that carry a loss, in all blocks."""
        return sum(block.trained_tokens for block in self.blocks)


def build(
    rows: Sequence[Mapping[str, Any]], pre: PreProcess, tokenizer: Tokenizer, seed: int | None = None
) -> Blocks:
    """Render, tokenise and arrange rows.

    Args:
        rows: column -> value.
        pre: template and strategy.
        tokenizer: of the model to train.
        seed: for the random strategies, where ``pre.random_seed`` is not set.

    Raises:
        ConfigError: the rows do not fit the template, a setting the strategy needs is missing, or nothing
            would be trained on.
    """
    missing = settings_missing(pre, seed)
    if missing:
        raise ConfigError(problems=missing)
    parts = groups(pre, rows)
    encoded = scatter(
        len(rows),
        [
            (group, tokenizer.encode_rows(render_all(group.pre, group.rows, tokenizer.chat), group.pre))
            for group in parts
        ],
    )
    learns_all = all(group.pre.train_on in (None, "all") for group in parts)
    pre = pre.model_copy(update={"train_on": "all" if learns_all else "completion"})
    joiner = tokenizer.encode(pre.joiner) if pre.strategy.startswith("join") and pre.joiner else []
    return arrange(encoded, pre, joiner, seed)


def build_held_out(
    rows: Sequence[Mapping[str, Any]], pre: PreProcess, tokenizer: Tokenizer, seed: int | None = None
) -> Blocks:
    """Blocks to evaluate on: as ``build``, but joined rows lose no tail and each label counts once."""
    if pre.strategy.startswith("join"):
        pre = pre.model_copy(update={"strategy": "join-sliding-window", "stride": pre.max_seq_len})
    return build(rows, pre, tokenizer, seed)


def settings_missing(pre: PreProcess, seed: int | None = None) -> list[Problem]:
    """Settings the strategy needs and does not have."""
    if pre.strategy.endswith("-random") and pre.random_seed is None and seed is None:
        return [Problem(f"strategy {pre.strategy} draws at random and has no seed", fix="set random_seed")]
    if pre.strategy == "join-sliding-window":
        if pre.stride is None:
            fix = f"set stride, for example {pre.max_seq_len // 2}"
            return [Problem("strategy join-sliding-window has no stride", fix=fix)]
        if pre.stride > pre.max_seq_len:
            return [
                Problem(
                    f"stride {pre.stride} is more than max_seq_len {pre.max_seq_len} and would skip tokens",
                    fix=f"set stride to {pre.max_seq_len} or less",
                )
            ]
    return []


def arrange(
    encoded: Sequence[Encoded], pre: PreProcess, joiner: list[int], seed: int | None = None
) -> Blocks:
    """Blocks of encoded rows, by the strategy of ``pre``; ``joiner`` are the tokens between joined rows."""
    notes: list[Problem] = []
    if pre.strategy.startswith("line-by-line") or pre.strategy == "pack":
        documents = _cut(encoded, pre, notes)
        blocks = _lines(documents, pre, seed) if pre.strategy != "pack" else _pack(documents, pre.max_seq_len)
    elif pre.strategy == "join-random":
        blocks = _join_random(encoded, pre, joiner, seed)
    else:
        stream = _stream(encoded, pre, joiner)
        blocks = _windows(stream, pre, notes)
    if pre.max_samples is not None:
        blocks = blocks[: pre.max_samples]
    taught = [block for block in blocks if block.trained_tokens]
    if not taught:
        raise _nothing(encoded, pre, blocks)
    if len(taught) < len(blocks):
        notes.append(_idle(len(blocks) - len(taught), len(blocks), "blocks"))
    return Blocks(taught, len(encoded), tuple(notes))


def _note(message: str, fix: str | None = None, severity: Severity = Severity.WARNING) -> Problem:
    return Problem(message, fix=fix, severity=severity)


def _idle(count: int, total: int, what: str) -> Problem:
    return _note(f"{count} of {total} {what} hold no token to learn and are left out")


def _cut(encoded: Sequence[Encoded], pre: PreProcess, notes: list[Problem]) -> list[Encoded]:
    """Documents no longer than max_seq_len that still teach something; short ones dropped when asked."""
    limit = pre.max_seq_len
    long = sum(len(row.ids) > limit for row in encoded)
    if long:
        longest = max(len(row.ids) for row in encoded)
        notes.append(
            _note(
                f"{long} of {len(encoded)} rows are cut to max_seq_len {limit}; the longest has {longest}",
                f"set max_seq_len to {longest} to keep them whole",
            )
        )
    documents = [
        Encoded(row.ids[:limit], row.labels[:limit])
        for row in encoded
        if len(row.ids) >= (limit if pre.drop_short_sequences and pre.strategy != "pack" else 1)
    ]
    taught = [row for row in documents if any(label != IGNORE for label in row.labels[1:])]
    if taught and len(taught) < len(documents):
        notes.append(_idle(len(documents) - len(taught), len(documents), "rows"))
    return taught


def _lines(documents: list[Encoded], pre: PreProcess, seed: int | None) -> list[Block]:
    if pre.strategy == "line-by-line-random" and documents:
        draw = _draws(pre, seed, len(documents))
        documents = [documents[next(draw)] for _ in range(pre.max_samples or len(documents))]
    return [Block(row.ids, row.labels, (len(row.ids),)) for row in documents]


def _draws(pre: PreProcess, seed: int | None, count: int) -> Iterator[int]:
    """Indices below ``count``, uniformly and with replacement."""
    generator = random.Random(pre.random_seed if pre.random_seed is not None else seed)  # noqa: S311
    while True:
        yield int(generator.random() * count)


def _pack(documents: list[Encoded], limit: int) -> list[Block]:
    blocks = []
    for bin_ in first_fit_decreasing([len(row.ids) for row in documents], limit):
        ids: list[int] = []
        labels: list[int] = []
        for index in bin_:
            ids += documents[index].ids
            # The logits before a document's first token belong to its neighbour: nothing to learn there.
            labels += [IGNORE, *documents[index].labels[1:]]
        blocks.append(Block(ids, labels, tuple(len(documents[index].ids) for index in bin_)))
    return blocks


def _stream(encoded: Sequence[Encoded], pre: PreProcess, joiner: list[int]) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    between = joiner if pre.train_on in (None, "all") else [IGNORE] * len(joiner)
    for index, row in enumerate(encoded):
        if index:
            ids += joiner
            labels += between
        ids += row.ids
        labels += row.labels
    return Encoded(ids, labels)


def _windows(stream: Encoded, pre: PreProcess, notes: list[Problem]) -> list[Block]:
    limit, total = pre.max_seq_len, len(stream.ids)
    if pre.strategy == "join":
        tail = total % limit
        if tail and total > limit:
            notes.append(
                _note(f"join drops the last {tail} of {total} tokens: no full block", severity=Severity.NOTE)
            )
        return [_window(stream, start, limit, 0) for start in range(0, total - limit + 1, limit)]
    stride = pre.stride or limit
    starts = list(range(0, max(total - limit, 0) + 1, stride))
    if starts[-1] + limit < total:
        starts.append(total - limit)
    blocks, counted = [], 0
    for start in starts:
        blocks.append(_window(stream, start, limit, counted))
        counted = start + limit
    return [block for block in blocks if block.ids]


def _window(stream: Encoded, start: int, limit: int, counted: int) -> Block:
    """The window at ``start``; labels of tokens before ``counted`` are masked, a window before has them."""
    ids, labels = stream.ids[start : start + limit], stream.labels[start : start + limit]
    overlap = max(0, counted - start)
    return Block(ids, [IGNORE] * overlap + labels[overlap:], (len(ids),))


def _join_random(
    encoded: Sequence[Encoded], pre: PreProcess, joiner: list[int], seed: int | None
) -> list[Block]:
    """Blocks that begin at a random row. Drawn among the rows that enough tokens follow: none is short."""
    limit = pre.max_seq_len
    stream = _stream(encoded, pre, joiner)
    starts = [0, *accumulate(len(row.ids) + len(joiner) for row in encoded)][: len(encoded)]
    fit = [start for start in starts if start + limit <= len(stream.ids)]
    if not fit:
        return []
    draw = _draws(pre, seed, len(fit))
    count = pre.max_samples or max(1, len(stream.ids) // limit)
    return [_window(stream, fit[next(draw)], limit, 0) for _ in range(count)]


def _nothing(encoded: Sequence[Encoded], pre: PreProcess, blocks: list[Block]) -> ConfigError:
    total = sum(len(row.ids) for row in encoded)
    had = f"{len(encoded)} rows with {total} tokens"
    longest = max((len(row.ids) for row in encoded), default=0)
    fix = None
    if pre.strategy.startswith("join") and not blocks:
        fix = f"set max_seq_len to {max(2, total)} or less, or use strategy pack, which needs no full block"
    elif pre.drop_short_sequences and pre.strategy != "pack" and longest < pre.max_seq_len:
        fix = f"set drop_short_sequences to false, or max_seq_len to {longest} or less"
    if fix is not None:
        made = f"strategy {pre.strategy} makes no block of {pre.max_seq_len} tokens"
        return ConfigError(f"{made} from {had}", fix=fix)
    first = [next((n for n, label in enumerate(row.labels) if n and label != IGNORE), 0) for row in encoded]
    if not any(first):
        return ConfigError(
            f"nothing would be learnt from {had}: every label is masked, no row has an answer to learn",
            fix="check the template and that rows have an answer, an assistant turn with words in it; "
            "or set train_on to all",
        )
    return ConfigError(
        f"nothing would be learnt from {had}: every label is masked, the answers begin beyond max_seq_len "
        f"{pre.max_seq_len}",
        fix=f"set max_seq_len to {min(n for n in first if n) + 1} or more; the longest row has {longest}",
    )
