"""Tokens on disk: encoded rows in one file, 4 bytes a token, and what is known of each row beside it.

``tokens.bin`` holds token ids as little-endian uint32; the highest bit says that the token is not learnt.
``rows.bin`` holds three arrays of uint32: tokens of each row, its first label's place from 1 on (0 for none),
and its labels within max_seq_len; ``keys.bin`` the keys of rows that may be split off. ``index.json`` is
written last, with the SHA-256 of the others: without it, or where it does not fit, there is nothing.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from olive.data.split import KEY
from olive.data.tokens import IGNORE, Encoded
from olive.errors import EnvironmentFault
from olive.resources.digest import file_digest
from olive.store.faults import reported

if TYPE_CHECKING:
    import numpy

_MASKED = 1 << 31
_FORMAT = 1
_INDEX, _TOKENS, _ROWS, _KEYS = "index.json", "tokens.bin", "rows.bin", "keys.bin"
_FLUSH = 1 << 20  # tokens gathered before they are written


class Store:
    """Encoded rows on disk.

    Args:
        folder: where they are.
        lengths, first, learnt: of each row, see ``layout.Documents``.
        keys: of each row, twice ``KEY`` bytes; empty where rows are not split.
    """

    def __init__(
        self, folder: Path, lengths: array[int], first: array[int], learnt: array[int], keys: bytes
    ) -> None:
        self.lengths, self.first, self.learnt, self._keys = lengths, first, learnt, keys
        self._path, self._file, self._process = folder / _TOKENS, -1, 0
        self._starts = array("Q", [0])
        for length in lengths:
            self._starts.append(self._starts[-1] + length)

    def row(self, index: int) -> Encoded:
        """A row, read from the file; nothing of it stays in memory."""
        import numpy

        if self._process != os.getpid():  # a worker of a data loader opens its own
            self._file, self._process = os.open(self._path, os.O_RDONLY), os.getpid()
        content = os.pread(self._file, 4 * self.lengths[index], 4 * self._starts[index])
        raw = numpy.frombuffer(content, dtype="<u4")
        ids = raw & (_MASKED - 1)
        labels = numpy.where(raw >= _MASKED, IGNORE, ids.astype(numpy.int64))
        return Encoded(ids.tolist(), labels.tolist())

    def keys(self, order: Sequence[int], kind: int) -> numpy.ndarray[Any, Any]:
        """Keys of rows as two big-endian uint64 each: ``kind`` 0 who they are, 1 where in the draw."""
        import numpy

        table = numpy.frombuffer(self._keys, dtype=">u8").reshape(-1, 2, 2)
        return table[numpy.frombuffer(array("I", order), dtype=numpy.uint32), kind]

    def __del__(self) -> None:
        if self._file >= 0 and self._process == os.getpid():
            os.close(self._file)


class Stored:
    """Some rows of a store, in an order of their own: ``layout.Documents``.

    Args:
        store: where they are.
        order: their numbers there.
        name: how messages name a number.
    """

    def __init__(self, store: Store, order: Sequence[int], name: Callable[[int], str]) -> None:
        self._store, self._order, self._name = store, order, name
        straight = order == range(len(store.lengths))
        self.lengths, self.first, self.learnt = (
            numbers if straight else array("I", (numbers[index] for index in order))
            for numbers in (store.lengths, store.first, store.learnt)
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Encoded:
        return self._store.row(self._order[index])

    def name(self, index: int) -> str:
        """How messages name a row."""
        return self._name(self._order[index])


class Writer:
    """Writes a store, or finds the one that is there.

    Args:
        folder: where it goes.
        limit: max_seq_len, for the counts of labels.
        keyed: whether rows have keys.

    Attributes:
        documents: rows written, or passed over since they are there.
        store: the store; after the ``with`` block.
    """

    store: Store

    def __init__(self, folder: Path, limit: int, *, keyed: bool) -> None:
        self.folder, self.limit, self.keyed, self.documents = folder, limit, keyed, 0
        self._arrays = (array("I"), array("I"), array("I"))
        self._keys, self._pending = bytearray(), array("I")
        self._found = _read(folder, limit, keyed)

    def passed(self, count: int) -> bool:
        """Whether the next ``count`` rows are in the store that is there, and so need not be written.

        Raises:
            EnvironmentFault: a store is there, and it is of other rows.
        """
        if self._found is None:
            return False
        self.documents += count
        if self.documents > len(self._found.lengths):
            raise EnvironmentFault(
                f"the tokens in {self.folder} are of other data than there is now", fix="remove that folder"
            )
        return True

    def __enter__(self) -> Self:
        if self._found is None:
            with reported(self.folder, "writing tokens"):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / _INDEX).unlink(missing_ok=True)
                self._file = (self.folder / _TOKENS).open("wb")
        return self

    def add(self, row: Encoded) -> None:
        """Write a row."""
        labels = row.labels
        # one bit says what a label is: nothing, or the token itself
        if any(label not in (IGNORE, token) for token, label in zip(row.ids, labels, strict=True)):
            raise ValueError("a label is neither its token nor -100")
        self._pending.extend(
            token if label != IGNORE else token | _MASKED
            for token, label in zip(row.ids, labels, strict=True)
        )
        lengths, first, learnt = self._arrays
        lengths.append(len(row.ids))
        first.append(next((place for place, label in enumerate(labels) if place and label != IGNORE), 0))
        within = labels[1 : self.limit]
        learnt.append(len(within) - within.count(IGNORE))
        self.documents += 1
        if len(self._pending) >= _FLUSH:
            self._flush()

    def add_keys(self, identity: bytes, draw: bytes) -> None:
        """Keys of the next row."""
        self._keys += identity + draw

    def _flush(self) -> None:
        if sys.byteorder == "big":
            self._pending.byteswap()
        with reported(self.folder, "writing tokens"):
            self._file.write(self._pending.tobytes())
        self._pending = array("I")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._found is not None:
            self.store = self._found
            return
        if kind is None:
            self._flush()
        self._file.close()
        if kind is not None:
            return
        with reported(self.folder, "writing tokens"):
            (self.folder / _ROWS).write_bytes(b"".join(numbers.tobytes() for numbers in self._arrays))
            (self.folder / _KEYS).write_bytes(self._keys)
            _seal(self.folder, self.limit, self.keyed)
        self.store = Store(self.folder, *self._arrays, bytes(self._keys))


def _seal(folder: Path, limit: int, keyed: bool) -> None:
    """Sync what was written, and say in the index what it is."""
    for name in (_TOKENS, _ROWS, _KEYS):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    fresh = folder / f"{_INDEX}.tmp"
    fresh.write_text(json.dumps(_index(folder, limit, keyed)), encoding="utf-8")
    with fresh.open("rb") as file:
        os.fsync(file.fileno())
    fresh.rename(folder / _INDEX)


def _index(folder: Path, limit: int, keyed: bool) -> dict[str, Any]:
    digests = {name: file_digest(folder / name) for name in (_TOKENS, _ROWS, _KEYS)}
    order = {"byteorder": sys.byteorder, "key_bytes": KEY}
    return {"format": _FORMAT, "max_seq_len": limit, "keyed": keyed, "sha256": digests, **order}


def _read(folder: Path, limit: int, keyed: bool) -> Store | None:
    """The store in a folder; None where there is none that is whole and of this kind."""
    try:
        said = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if said != _index(folder, limit, keyed):
            return None
    except (FileNotFoundError, ValueError):
        return None
    numbers = array("I")
    numbers.frombytes((folder / _ROWS).read_bytes())
    third = len(numbers) // 3
    lengths, first, learnt = (numbers[start * third : (start + 1) * third] for start in range(3))
    return Store(folder, lengths, first, learnt, (folder / _KEYS).read_bytes())
