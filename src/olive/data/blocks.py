"""Encoded rows to the blocks a model is trained on: the strategies."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olive.config.workflow import PreProcess
from olive.data.layout import Block, Documents, Held, Laid, Stream, whole
from olive.data.mixture import groups, name_of, scatter
from olive.data.packing import packed
from olive.data.template import render_all
from olive.data.tokens import Encoded, Tokenizer
from olive.errors import ConfigError, Problem, Severity


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of a dataset, never none.

    Attributes:
        blocks: the blocks.
        rows: number of rows they were made from.
        notes: what the user should know: rows cut, rows left out, a tail dropped.
    """

    blocks: Sequence[Block]
    rows: int
    notes: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    @property
    def tokens(self) -> int:
        """Tokens in all blocks."""
        if isinstance(self.blocks, Laid):
            return sum(self.blocks.sizes)
        return sum(len(block.ids) for block in self.blocks)

    @property
    def trained_tokens(self) -> int:
        """Positions that carry a loss, in all blocks."""
        if isinstance(self.blocks, Laid):
            return sum(self.blocks.learnt)
        return sum(block.trained_tokens for block in self.blocks)


def build(
    rows: Sequence[Mapping[str, Any]],
    pre: PreProcess,
    tokenizer: Tokenizer,
    seed: int | None = None,
    places: Sequence[int] | None = None,
) -> Blocks:
    """Render, tokenise and arrange rows.

    Args:
        rows: column -> value.
        pre: template and strategy.
        tokenizer: of the model to train.
        seed: for the random strategies, where ``pre.random_seed`` is not set.
        places: numbers of the rows in the data, for messages, where they are but some of them.

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
    pre = learning(pre, [group.pre for group in parts])

    def name(index: int) -> str:
        return name_of(rows[index], index if places is None else places[index])

    return arrange(encoded, pre, joiner_of(pre, tokenizer), seed, name)


def learning(pre: PreProcess, parts: Iterable[PreProcess]) -> PreProcess:
    """``pre`` as it arranges rows that become text as ``parts`` say: joiners are learnt where all else is."""
    learns_all = all(part.train_on in (None, "all") for part in parts)
    return pre.model_copy(update={"train_on": "all" if learns_all else "completion"})


def joiner_of(pre: PreProcess, tokenizer: Tokenizer) -> list[int]:
    """The tokens between joined rows."""
    return tokenizer.encode(pre.joiner) if pre.strategy.startswith("join") and pre.joiner else []


def build_held_out(
    rows: Sequence[Mapping[str, Any]],
    pre: PreProcess,
    tokenizer: Tokenizer,
    seed: int | None = None,
    places: Sequence[int] | None = None,
) -> Blocks:
    """Blocks to evaluate on: as ``build``, but joined rows lose no tail and each label counts once."""
    return build(rows, held_out(pre), tokenizer, seed, places)


def held_out(pre: PreProcess) -> PreProcess:
    """``pre`` as it arranges rows to evaluate on."""
    if not pre.strategy.startswith("join"):
        return pre
    return pre.model_copy(update={"strategy": "join-sliding-window", "stride": pre.max_seq_len})


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
    encoded: Sequence[Encoded] | Documents,
    pre: PreProcess,
    joiner: list[int],
    seed: int | None = None,
    name: Callable[[int], str] = "row {}".format,
) -> Blocks:
    """Blocks of encoded rows, by the strategy of ``pre``; ``joiner`` are the tokens between joined rows.

    Rows that are kept on disk stay there: their blocks are read when asked for.
    """
    notes: list[Problem] = []
    held = isinstance(encoded, Sequence)
    documents = Held(encoded, pre.max_seq_len, name) if isinstance(encoded, Sequence) else encoded
    if pre.strategy.startswith("line-by-line") or pre.strategy == "pack":
        blocks = _documents(documents, pre, seed, notes)
    else:
        stream = Stream(documents, joiner, learnt=pre.train_on in (None, "all"))
        blocks = _windows(stream, pre, seed, notes)
    if pre.max_samples is not None:
        blocks = blocks[: pre.max_samples]
    kept = array("I", (index for index, learnt in enumerate(blocks.learnt) if learnt))
    if not kept:
        raise _nothing(documents, pre, len(blocks))
    if len(kept) < len(blocks):
        notes.append(_idle(len(blocks) - len(kept), len(blocks), "blocks"))
        blocks = blocks.only(kept)
    return Blocks(list(blocks) if held else blocks, len(documents), tuple(notes))


def _note(message: str, fix: str | None = None, severity: Severity = Severity.WARNING) -> Problem:
    return Problem(message, fix=fix, severity=severity)


def _idle(count: int, total: int, what: str) -> Problem:
    return _note(f"{count} of {total} {what} hold no token to learn and are left out")


def _documents(documents: Documents, pre: PreProcess, seed: int | None, notes: list[Problem]) -> Laid:
    """Blocks of whole documents: one each, or packed."""
    taught, limit = _taught(documents, pre, notes), pre.max_seq_len
    if pre.strategy == "pack":
        sizes = array("I", (min(limit, documents.lengths[index]) for index in taught))
        order, starts = packed(sizes, limit)
        return whole(documents, array("I", (taught[i] for i in order)), starts, limit, packed=True)
    if pre.strategy == "line-by-line-random" and taught:
        draw = _draws(pre, seed, len(taught))
        taught = array("I", (taught[next(draw)] for _ in range(pre.max_samples or len(taught))))
    return whole(documents, taught, range(len(taught) + 1), limit, packed=False)


def _taught(documents: Documents, pre: PreProcess, notes: list[Problem]) -> array[int]:
    """Documents that still teach something when cut to max_seq_len; short ones dropped when asked."""
    limit, lengths = pre.max_seq_len, documents.lengths
    long = sum(length > limit for length in lengths)
    if long:
        longest = max(lengths)
        notes.append(
            _note(
                f"{long} of {len(documents)} rows are cut to max_seq_len {limit}; the longest has {longest}",
                f"set max_seq_len to {longest} to keep them whole",
            )
        )
    least = limit if pre.drop_short_sequences and pre.strategy != "pack" else 1
    kept = sum(length >= least for length in lengths)
    learnt = documents.learnt
    taught = array("I", (index for index, length in enumerate(lengths) if length >= least and learnt[index]))
    if taught and len(taught) < kept:
        notes.append(_idle(kept - len(taught), kept, "rows"))
    return taught


def _draws(pre: PreProcess, seed: int | None, count: int) -> Iterator[int]:
    """Indices below ``count``, uniformly and with replacement."""
    generator = random.Random(pre.random_seed if pre.random_seed is not None else seed)  # noqa: S311
    while True:
        yield int(generator.random() * count)


def _windows(stream: Stream, pre: PreProcess, seed: int | None, notes: list[Problem]) -> Laid:
    """Blocks cut from the joined rows."""
    limit, total = pre.max_seq_len, stream.total
    starts: Sequence[int]
    if pre.strategy == "join-random":
        starts = _random_starts(stream, pre, seed)
    elif pre.strategy == "join":
        tail = total % limit
        if tail and total > limit:
            notes.append(
                _note(f"join drops the last {tail} of {total} tokens: no full block", severity=Severity.NOTE)
            )
        starts = range(0, total - limit + 1, limit)
    else:
        starts = array("Q", range(0, max(total - limit, 0) + 1, pre.stride or limit) if total else ())
        if starts and starts[-1] + limit < total:
            starts.append(total - limit)

    def make(place: int) -> Block:
        before = place and pre.strategy == "join-sliding-window"
        return stream.window(starts[place], limit, starts[place - 1] + limit if before else 0)

    sizes, learnt = array("I"), array("I")
    for place in range(len(starts)):
        block = make(place)
        sizes.append(len(block.ids))
        learnt.append(block.trained_tokens)
    return Laid(make, range(len(starts)), sizes, learnt)


def _random_starts(stream: Stream, pre: PreProcess, seed: int | None) -> array[int]:
    """Starts of random rows, drawn among those that enough tokens follow: no block is short."""
    limit = pre.max_seq_len
    fit = sum(start + limit <= stream.total for start in stream.starts)
    if not fit:
        return array("Q")
    draw = _draws(pre, seed, fit)
    count = pre.max_samples or max(1, stream.total // limit)
    return array("Q", (stream.starts[next(draw)] for _ in range(count)))


def _nothing(documents: Documents, pre: PreProcess, blocks: int) -> ConfigError:
    total = sum(documents.lengths)
    had = f"{len(documents)} rows with {total} tokens"
    longest = max(documents.lengths, default=0)
    fix = None
    if pre.strategy.startswith("join") and not blocks:
        fix = f"set max_seq_len to {max(2, total)} or less, or use strategy pack, which needs no full block"
    elif pre.drop_short_sequences and pre.strategy != "pack" and longest < pre.max_seq_len:
        fix = f"set drop_short_sequences to false, or max_seq_len to {longest} or less"
    if fix is not None:
        made = f"strategy {pre.strategy} makes no block of {pre.max_seq_len} tokens"
        return ConfigError(f"{made} from {had}", fix=fix)
    if not any(documents.first):
        return ConfigError(
            f"nothing would be learnt from {had}: every label is masked, no row has an answer to learn",
            fix="check the template and that rows have an answer, an assistant turn with words in it; "
            "or set train_on to all",
        )
    return ConfigError(
        f"nothing would be learnt from {had}: every label is masked, the answers begin beyond max_seq_len "
        f"{pre.max_seq_len}",
        fix=f"set max_seq_len to {min(n for n in documents.first if n) + 1} or more; the longest row has "
        f"{longest}",
    )
