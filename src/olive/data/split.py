"""Rows to a training and an evaluation part that share no row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from olive.config.workflow import PreProcess
from olive.data.mixture import groups as groups_of
from olive.data.template import render
from olive.errors import ConfigError

Row = dict[str, Any]


def split_rows(
    rows: Sequence[Row], eval_size: float, seed: int, pre: PreProcess | None = None
) -> tuple[list[Row], list[Row]]:
    """The rows at ``split_places``."""
    train, held_out = split_places(rows, eval_size, seed, pre)
    return [rows[index] for index in train], [rows[index] for index in held_out]


def split_places(
    rows: Sequence[Row], eval_size: float, seed: int, pre: PreProcess | None = None
) -> tuple[Sequence[int], Sequence[int]]:
    """Split off an evaluation part. Rows that are the same are always in the same part.

    A row's part depends on the seed and the row's content alone, as far as the sizes allow, and the order of
    the rows is kept.

    Args:
        rows: the rows.
        eval_size: below 1 a share, rounded up; from 1 on a number of rows; 0 for no evaluation part.
        seed: another seed, another split.
        pre: when given, rows that render to the same text count as the same.

    Returns:
        Places of training rows and of evaluation rows. The evaluation part misses its size by less than the
        largest group of repeated rows.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    if eval_size == 0:
        return range(len(rows)), []
    if eval_size < 0:
        raise ConfigError(f"eval_dataset_size {eval_size} is negative", fix="give a share, 0.1, or a count")
    # A share of 0.3 of 10 rows is 3, though 0.3 * 10 in floating point may be a hair more.
    wanted = math.ceil(round(eval_size * len(rows), 9)) if eval_size < 1 else int(eval_size)
    groups: dict[str, list[int]] = {}
    ways = {place: group.pre for group in groups_of(pre, rows) for place in group.places} if pre else {}
    for index, row in enumerate(rows):
        groups.setdefault(_identity(row, ways.get(index)), []).append(index)
    if wanted >= len(rows) or len(groups) < 2:
        raise ConfigError(
            f"eval_dataset_size {eval_size} leaves nothing to train on: "
            f"{len(rows)} rows, {len(groups)} distinct",
            fix="give more rows or a smaller eval_dataset_size",
        )
    names = {key: min(_canonical(rows[index]) for index in members) for key, members in groups.items()}
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}\0{names[key]}".encode()).digest())
    chosen: set[int] = set()
    for key in order:
        if len(chosen) + len(groups[key]) <= wanted:
            chosen.update(groups[key])
    if not chosen:
        chosen.update(groups[min(order, key=lambda key: len(groups[key]))])
    return [index for index in range(len(rows)) if index not in chosen], sorted(chosen)


def _identity(row: Row, pre: PreProcess | None) -> str:
    if pre is not None and not pre.chat_template and pre.format is None:
        return render(pre, row).full
    return _canonical(row)


def _canonical(row: Row) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)


def split_seed(training_args: Mapping[str, Any]) -> int:
    """The seed of a training's data: ``data_seed``, else ``seed``, else 42 as transformers has it."""
    given = (training_args.get(name) for name in ("data_seed", "seed"))
    return int(next((value for value in given if value is not None), 42))
