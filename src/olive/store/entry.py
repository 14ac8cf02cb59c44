"""What the store gives out: a stored result, and a folder to make one in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olive.store.integrity import FileTable


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored result.

    Attributes:
        key: 64 hex digits.
        path: the folder of its files; to be read only.
        digest: sha256 over names, sizes and content of the files, hex.
        size: bytes of all files.
        meta: JSON facts kept with it.
        inputs: the labelled parts its key was made of.
        created: seconds since the epoch, UTC.
        used: seconds since the epoch when it was last looked up.
        files: name -> (bytes, sha256).
    """

    key: str
    path: Path
    digest: str
    size: int
    meta: dict[str, Any]
    inputs: dict[str, Any]
    created: float
    used: float
    files: FileTable = field(repr=False)


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder to make a result in. Gone when its context ends, published or not."""

    path: Path
