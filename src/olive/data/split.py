"""Rows to a training and an evaluation part that share no row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from olive.config.workflow import PreProcess
from olive.data.formats import sides
from olive.data.mixture import groups as groups_of
from olive.data.template import render
from olive.errors import ConfigError

if TYPE_CHECKING:
    import numpy

Row = dict[str, Any]
KEY = 16  # bytes of a row's keys


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
        pre: when given, rows that render to the same text count as the same, and so do preferences between
            answers to one prompt.

    Returns:
        Places of training rows and of evaluation rows. The evaluation part misses its size by less than the
        largest group of repeated rows.

    Raises:
        ConfigError: one of the parts would be empty.
    """
    if eval_size == 0:
        return range(len(rows)), []
    ways = {place: group.pre for group in groups_of(pre, rows) for place in group.places} if pre else {}
    groups: dict[bytes, list[int]] = {}
    draws: dict[bytes, bytes] = {}
    for index, row in enumerate(rows):
        key, draw = row_keys(row, ways.get(index), seed)
        groups.setdefault(key, []).append(index)
        draws[key] = min(draw, draws.get(key, draw))
    wanted = _wanted(eval_size, len(rows), len(groups))
    order = sorted(groups, key=draws.__getitem__)
    chosen: set[int] = set()
    for key in order:
        if len(chosen) + len(groups[key]) <= wanted:
            chosen.update(groups[key])
    if not chosen:
        chosen.update(groups[min(order, key=lambda key: len(groups[key]))])
    return [index for index in range(len(rows)) if index not in chosen], sorted(chosen)


def row_keys(row: Mapping[str, Any], pre: PreProcess | None, seed: int) -> tuple[bytes, bytes]:
    """Who a row is, and where in the draw: rows of one identity stay together, by the lowest of their draws.

    Args:
        row: the row.
        pre: how it becomes text, resolved; None where its content alone counts.
        seed: of the split.

    Returns:
        Twice ``KEY`` bytes.
    """
    given = dict(row)
    draw = f"{seed}\0{_canonical(given)}"
    return _key(_identity(given, pre)), _key(draw)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:KEY]


def choose(
    identities: numpy.ndarray[Any, Any], draws: numpy.ndarray[Any, Any], eval_size: float
) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
    """As ``split_places``, for millions of rows.

    Args:
        identities: who the rows are, (rows, 2), big-endian uint64.
        draws: where in the draw they are, in the same form.
        eval_size: as ``split_places``.
    """
    import numpy

    count = len(identities)
    # by identity, and in it by draw: the first row of each identity has its lowest draw
    order = numpy.lexsort((draws[:, 1], draws[:, 0], identities[:, 1], identities[:, 0]))
    apart = numpy.any(identities[order[1:]] != identities[order[:-1]], axis=1)
    firsts = numpy.concatenate(([0], numpy.flatnonzero(apart) + 1))
    sizes = numpy.diff(numpy.concatenate((firsts, [count])))
    wanted = _wanted(eval_size, count, len(firsts))
    lowest = draws[order[firsts]]
    drawn = numpy.lexsort((lowest[:, 1], lowest[:, 0]))
    taken, groups = 0, []
    for group in drawn:
        if taken == wanted:
            break
        if taken + sizes[group] <= wanted:
            groups.append(group)
            taken += sizes[group]
    groups = groups or [drawn[numpy.argmin(sizes[drawn])]]
    held_out = numpy.zeros(count, dtype=bool)
    for group in groups:
        held_out[order[firsts[group] : firsts[group] + sizes[group]]] = True
    return numpy.flatnonzero(~held_out), numpy.flatnonzero(held_out)


def wanted_rows(eval_size: float, rows: int) -> int:
    """Rows that ``eval_size`` means of ``rows``."""
    # A share of 0.3 of 10 rows is 3, though 0.3 * 10 in floating point may be a hair more.
    return math.ceil(round(eval_size * rows, 9)) if eval_size < 1 else int(eval_size)


def _wanted(eval_size: float, rows: int, distinct: int) -> int:
    """Rows to split off."""
    if eval_size < 0:
        raise ConfigError(f"eval_dataset_size {eval_size} is negative", fix="give a share, 0.1, or a count")
    wanted = wanted_rows(eval_size, rows)
    if wanted >= rows or distinct < 2:
        raise ConfigError(
            f"eval_dataset_size {eval_size} leaves nothing to train on: {rows} rows, {distinct} distinct",
            fix="give more rows or a smaller eval_dataset_size",
        )
    return wanted


def _identity(row: Row, pre: PreProcess | None) -> str:
    if pre is not None and pre.format == "preference":
        return json.dumps(sides(row)[0], sort_keys=True, default=str)
    if pre is not None and not pre.chat_template and pre.format is None:
        return render(pre, row).full
    return _canonical(row)


def _canonical(row: Row) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=True, default=str)


def split_seed(training_args: Mapping[str, Any]) -> int:
    """The seed of a training's data: ``data_seed``, else ``seed``, else 42 as transformers has it."""
    given = (training_args.get(name) for name in ("data_seed", "seed"))
    return int(next((value for value in given if value is not None), 42))
