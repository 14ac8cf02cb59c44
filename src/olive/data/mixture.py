"""Rows of several data configs as one dataset: drawn by weight, each with its own way to become text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from olive.config.workflow import PreProcess
from olive.data import formats

T = TypeVar("T")


class MixedRow(dict[str, Any]):
    """A row of a mix.

    Attributes:
        source: name of the data config it is from.
        index: its place among the rows of that config.
        pre: how it becomes text.
    """

    __slots__ = ("index", "pre", "source")

    def __init__(self, row: Mapping[str, Any], source: str, index: int, pre: PreProcess) -> None:
        super().__init__(row)
        self.source, self.index, self.pre = source, index, pre


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that become text in the same way.

    Attributes:
        pre: how, resolved.
        rows: the rows.
        places: where each stands among all rows.
    """

    pre: PreProcess
    rows: Sequence[Mapping[str, Any]]
    places: Sequence[int]


def groups(pre: PreProcess, rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Rows by how they become text: one group, but for a mix; in the order of first appearance.

    Raises:
        ConfigError: as ``formats.resolve``.
    """
    if not any(isinstance(row, MixedRow) for row in rows):
        return [Group(formats.resolve(pre, rows), rows, range(len(rows)))]
    found: dict[int, tuple[PreProcess, list[int]]] = {}
    for index, row in enumerate(rows):
        own = row.pre if isinstance(row, MixedRow) else pre
        found.setdefault(id(own), (own, []))[1].append(index)
    return [Group(own, [rows[index] for index in places], places) for own, places in found.values()]


def scatter(count: int, parts: Sequence[tuple[Group, Sequence[T]]]) -> list[T]:
    """What was made of each group's rows, in the order of all ``count`` rows."""
    by_place = {place: item for group, made in parts for place, item in zip(group.places, made, strict=True)}
    return [by_place[index] for index in range(count)]


def name_of(row: Mapping[str, Any], index: int) -> str:
    """How messages name a row."""
    return f"{row.source} row {row.index}" if isinstance(row, MixedRow) else f"row {index}"


def tagged(rows: Sequence[Mapping[str, Any]], source: str, pre: PreProcess) -> list[MixedRow]:
    """Rows that know where they are from; those of a mix in a mix know it already.

    Raises:
        ConfigError: as ``formats.resolve``.
    """
    own = groups(pre, rows)[0].pre
    return [
        row if isinstance(row, MixedRow) else MixedRow(row, source, index, own)
        for index, row in enumerate(rows)
    ]


def mixed(parts: Sequence[tuple[Sequence[T], float]], seed: int) -> list[T]:
    """Each part's rows as often as its weight says, shuffled.

    A weight of 2.5 takes every row twice and a random half of them once more; a random share is rounded to
    whole rows. What is drawn of a part follows from the seed, the part's place and its number of rows alone.

    Args:
        parts: rows and weight of each.
        seed: of the draws and of the order.
    """
    taken: list[T] = []
    for place, (rows, weight) in enumerate(parts):
        whole = int(weight)
        taken += list(rows) * whole
        taken += choice(rows, int((weight - whole) * len(rows) + 0.5), f"{seed}:{place}")
    return [taken[index] for index in _order(len(taken), str(seed))]


def choice(rows: Sequence[T], count: int, seed: str) -> list[T]:
    """``count`` of the rows, chosen by seed, in their order."""
    return [rows[index] for index in sorted(_order(len(rows), seed)[:count])]


def _order(count: int, seed: str) -> list[int]:
    """A random order of ``count`` things; the same in every version of Python."""
    generator = random.Random(seed)  # noqa: S311 - a draw, not a secret
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
