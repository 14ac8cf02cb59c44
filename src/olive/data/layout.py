"""Which tokens of which rows make which block: laid out by lengths alone, the tokens read when asked for."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol, overload

from olive.data.tokens import IGNORE, Encoded


@dataclass(frozen=True, slots=True)
class Block:
    """One training sequence.

    Attributes:
        ids: token ids.
        labels: the ids, with ``-100`` where nothing is learnt. Not shifted: the label at ``i`` is the target
            of the logits at ``i - 1``, and the first label of a document has no logits of its own.
        lengths: lengths of the documents inside, in order; their sum is ``len(ids)``. Attention stays
            within a document and positions restart at each.
        rows: how messages name the row that each document begins with.
    """

    ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]
    rows: tuple[str, ...] = field(default=(), compare=False)

    @property
    def positions(self) -> list[int]:
        """Position ids, restarting at each document."""
        return [position for length in self.lengths for position in range(length)]

    @property
    def trained_tokens(self) -> int:
        """How many positions carry a loss."""
        firsts = {0, *accumulate(self.lengths)}
        taken = sum(self.labels[index] != IGNORE for index in firsts if index < len(self.labels))
        return len(self.labels) - self.labels.count(IGNORE) - taken


class Documents(Protocol):
    """Encoded rows, wherever they are kept.

    Attributes:
        lengths: tokens of each.
        first: for each, the first place from 1 on that has a label; 0 where none has.
        learnt: for each, how many of its first max_seq_len tokens have a label, the very first aside.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each."""

    @property
    def first(self) -> Sequence[int]:
        """The first label's place from 1 on; 0 for none."""

    @property
    def learnt(self) -> Sequence[int]:
        """Labels to learn within max_seq_len."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Encoded: ...

    def name(self, index: int) -> str:
        """How messages name a row."""


class Held:
    """Documents in memory.

    Args:
        encoded: the rows.
        limit: max_seq_len.
        name: how messages name them.
    """

    def __init__(self, encoded: Sequence[Encoded], limit: int, name: Callable[[int], str]) -> None:
        self._encoded, self.name = encoded, name
        self.lengths, self.first, self.learnt = array("I"), array("I"), array("I")
        for row in encoded:
            self.lengths.append(len(row.ids))
            self.first.append(next((n for n, label in enumerate(row.labels) if n and label != IGNORE), 0))
            self.learnt.append(sum(label != IGNORE for label in row.labels[1:limit]))

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Encoded:
        return self._encoded[index]


class Laid(Sequence[Block]):
    """Blocks whose tokens are read when one is asked for.

    Args:
        make: gives the block at a place of the layout.
        places: the places, in order.
        sizes: tokens of each block.
        learnt: positions of each block that carry a loss.
    """

    def __init__(
        self,
        make: Callable[[int], Block],
        places: Sequence[int],
        sizes: Sequence[int],
        learnt: Sequence[int],
    ) -> None:
        self.make, self.places, self.sizes, self.learnt = make, places, sizes, learnt

    def __len__(self) -> int:
        return len(self.places)

    def only(self, kept: Sequence[int]) -> Laid:
        """The blocks at ``kept``."""
        parts = (array("I", (part[index] for index in kept)) for part in (self.sizes, self.learnt))
        return Laid(self.make, array("Q", (self.places[index] for index in kept)), *parts)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Laid: ...
    def __getitem__(self, index: int | slice) -> Block | Laid:
        if isinstance(index, slice):
            return Laid(self.make, self.places[index], self.sizes[index], self.learnt[index])
        return self.make(self.places[index])

    def __iter__(self) -> Iterator[Block]:
        return (self.make(place) for place in self.places)


def whole(
    documents: Documents, order: Sequence[int], starts: Sequence[int], limit: int, *, packed: bool
) -> Laid:
    """Blocks of whole documents, each cut to ``limit``.

    Args:
        documents: the encoded rows.
        order: documents, those of a block together.
        starts: where each block begins in ``order``, with its length at the end.
        limit: tokens of a document that count.
        packed: documents have neighbours: the logits before a first token are another's, and it is no label.
    """

    def make(place: int) -> Block:
        ids: list[int] = []
        labels: list[int] = []
        inside = order[starts[place] : starts[place + 1]]
        for index in inside:
            row = documents[index]
            ids += row.ids[:limit]
            labels += [IGNORE, *row.labels[1:limit]] if packed else row.labels[:limit]
        lengths = tuple(min(limit, documents.lengths[index]) for index in inside)
        return Block(ids, labels, lengths, tuple(documents.name(index) for index in inside))

    def total(numbers: Sequence[int]) -> array[int]:
        spans = pairwise(starts)
        return array("I", (sum(numbers[index] for index in order[a:b]) for a, b in spans))

    sizes = total(array("I", (min(limit, length) for length in documents.lengths)))
    return Laid(make, range(len(starts) - 1), sizes, total(documents.learnt))


class Stream:
    """All documents behind each other, a joiner between each two.

    Args:
        documents: the encoded rows.
        joiner: tokens between them.
        learnt: whether the joiner has labels.

    Attributes:
        starts: where each document begins.
        total: tokens in all.
    """

    def __init__(self, documents: Documents, joiner: list[int], *, learnt: bool) -> None:
        self._documents = documents
        self._joiner = Encoded(joiner, list(joiner) if learnt else [IGNORE] * len(joiner))
        self.starts, self.total = array("Q"), 0
        for index, length in enumerate(documents.lengths):
            self.total += len(joiner) if index else 0
            self.starts.append(self.total)
            self.total += length

    def window(self, start: int, limit: int, counted: int = 0) -> Block:
        """The ``limit`` tokens from ``start`` on; what is before ``counted`` has no label: another has it."""
        stop = min(start + limit, self.total)
        place = max(0, bisect_right(self.starts, start) - 1)
        first = place
        ids: list[int] = []
        labels: list[int] = []
        while place < len(self.starts) and self.starts[place] < stop:
            at = self.starts[place]
            parts = ((at, self._documents[place]), (at + self._documents.lengths[place], self._joiner))
            for begin, part in parts if place + 1 < len(self.starts) else parts[:1]:
                piece = slice(max(0, start - begin), max(0, stop - begin))
                ids += part.ids[piece]
                labels += part.labels[piece]
            place += 1
        overlap = max(0, counted - start)
        labels = [IGNORE] * min(overlap, len(ids)) + labels[overlap:]
        return Block(ids, labels, (len(ids),), (self._documents.name(first),) if len(self.starts) else ())
