"""Data larger than memory: rows are read, rendered and tokenised some at a time, their tokens kept on disk.

What is held in memory is some 50 bytes a row, 100 more where rows are split off, and one chunk of rows.
Tokens are read with ``pread``, not mapped: pages of a map count as the process's own memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from olive.config.workflow import DataConfig, PreProcess
from olive.data import formats, rows
from olive.data.blocks import Blocks, arrange, held_out, joiner_of, learning, settings_missing
from olive.data.mixture import MixedRow, mixed
from olive.data.split import choose, row_keys
from olive.data.template import render_all
from olive.data.token_store import Stored, Writer
from olive.data.tokens import Tokenizer
from olive.errors import ConfigError

_CHUNK = 256  # rows tokenised at once
Told = Callable[[int, int], None]


@dataclass(slots=True)
class _Part:
    """Rows of one data config, in the store.

    Attributes:
        name: of the config; empty for a config that is no part of a mix.
        first: number of its first document.
        count: how many there are.
        pre: how they became text.
    """

    name: str
    first: int
    count: int
    pre: PreProcess


@dataclass(slots=True)
class _Survey:
    """Rows, looked at once: how many, their columns, the first."""

    count: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)


def build(
    config: DataConfig,
    base_dir: Path,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    seed: int,
    eval_size: float = 0,
    evaluation: bool = False,
    told: Told = lambda done, total: None,
) -> tuple[Blocks, Blocks | None]:
    """The blocks that ``blocks.build`` makes of the rows of ``config``, and those of rows split off.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.
        tokenizer: of the model to train.
        folder: where the tokens go; those that are whole there are used again.
        seed: of the split and of the random strategies.
        eval_size: as ``split.split_rows``.
        evaluation: the blocks are to evaluate on.
        told: called with rows done and rows in all.

    Raises:
        ConfigError: as ``blocks.build``, ``rows.read`` and ``split.split_rows``.
    """
    pre = config.pre_process_data_config
    if missing := settings_missing(pre, seed):
        raise ConfigError(problems=missing)
    parts: list[_Part] = []
    limit, keyed = pre.max_seq_len, bool(eval_size)
    # processes that train one model together: one writes, the others find what it wrote
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "writing.lock"), Writer(folder, limit, keyed=keyed) as writer:
        order = _encode(config, base_dir, tokenizer, writer, parts, seed, told, mixed_in=bool(config.mix))
    store = writer.store
    pre = learning(pre, [part.pre for part in parts if part.count])
    name = _names(parts)
    train, others = order, None
    if eval_size:
        places, held = choose(store.keys(order, 0), store.keys(order, 1), eval_size)
        train, others = _at(order, places), _at(order, held)

    def made(chosen: Sequence[int], how: PreProcess) -> Blocks:
        return arrange(Stored(store, chosen, name), how, joiner_of(how, tokenizer), seed)

    return (
        made(train, held_out(pre) if evaluation else pre),
        made(others, held_out(pre)) if others is not None and len(others) else None,
    )


def _at(order: Sequence[int], places: Iterable[int]) -> array[int]:
    return array("I", (order[place] for place in places))


def _names(parts: Sequence[_Part]) -> Callable[[int], str]:
    def name(document: int) -> str:
        part = next(part for part in reversed(parts) if part.first <= document)
        return f"{part.name} row {document - part.first}".strip()

    return name


def _encode(
    config: DataConfig,
    base_dir: Path,
    tokenizer: Tokenizer,
    writer: Writer,
    parts: list[_Part],
    seed: int,
    told: Told,
    *,
    mixed_in: bool,
) -> Sequence[int]:
    """Bring the rows of ``config`` into the store; returns their documents in the order of ``rows.read``."""
    if config.mix:
        drawn = [
            (
                _encode(member, base_dir, tokenizer, writer, parts, seed, told, mixed_in=True),
                part.weight,
            )
            for member, part in zip(rows.members(config), config.mix, strict=True)
        ]
        order = array("I", mixed(drawn, config.pre_process_data_config.random_seed or 0))
        if not order:
            raise rows.empty_mix(config)
        return order
    survey = _survey(rows.iterate(config, base_dir))
    if not survey.count:
        raise rows.no_rows(config)
    # what formats.resolve looks at: all columns, and the values of the first row
    pre = formats.resolve(config.pre_process_data_config, [survey.first, survey.columns])
    part = _Part(config.name if mixed_in else "", writer.documents, survey.count, pre)
    parts.append(part)
    if not writer.passed(part.count):
        _write(rows.iterate(config, base_dir), part, config.name, survey, tokenizer, writer, seed, told)
    return range(part.first, part.first + part.count)


def _survey(found: Iterator[dict[str, Any]]) -> _Survey:
    survey = _Survey()
    for row in found:
        if not survey.count:
            survey.first = row
        survey.count += 1
        if row.keys() - survey.columns.keys():
            survey.columns |= dict.fromkeys(row)
    return survey


def _write(
    found: Iterator[dict[str, Any]],
    part: _Part,
    source: str,
    survey: _Survey,
    tokenizer: Tokenizer,
    writer: Writer,
    seed: int,
    told: Told,
) -> None:
    done = 0
    for chunk in iter(lambda: list(islice(found, _CHUNK)), []):
        tagged = [MixedRow(row, source, done + index, part.pre) for index, row in enumerate(chunk)]
        if writer.keyed:
            for row in tagged:
                writer.add_keys(*row_keys(row, part.pre, seed))
        whole = [_filled(row, survey.columns) for row in tagged]
        texts = render_all(part.pre, whole, tokenizer.chat)
        for encoded in tokenizer.encode_rows(texts, part.pre):
            writer.add(encoded)
        done += len(chunk)
        told(done, survey.count)
    if done != survey.count:
        raise ConfigError(
            f"data config {source!r} changed while it was read: {done} rows, before {survey.count}"
        )


def _filled(row: MixedRow, columns: Mapping[str, None]) -> MixedRow:
    """The row with null for the columns that other rows have."""
    if len(row) == len(columns):
        return row
    return MixedRow({**columns, **row}, row.source, row.index, row.pre)
