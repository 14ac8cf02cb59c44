"""Digests of files and folders, with a memory for files that have not been touched since."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from olive.errors import ConfigError, UntrustedInput

_SETTLED = 2.0  # seconds: coarser clocks could give a file rewritten within them the same time twice
_MAX_ENTRIES = 20_000
_PARALLEL_FROM = 64 << 20
_FORMAT = 1


def file_digest(path: Path, memo: Path | None = None) -> str:
    """sha256 of a file's content, hex.

    Args:
        path: the file; a link is followed.
        memo: a JSON file that remembers digests by device, inode, size and both times; made when missing.

    Raises:
        ConfigError: no such file.
    """
    return _digests([path], memo)[0]


def folder_digest(path: Path, memo: Path | None = None) -> str:
    """sha256 over names, sizes and sha256 of every file below a folder, hex; links are followed.

    The same number as the store gives a folder of the same files.

    Raises:
        ConfigError: no such folder.
        UntrustedInput: a link makes a circle, or an entry is no file (a pipe, a device).
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder", fix="Name an existing folder.")
    return files_digest(path, _walk(path, "", frozenset()), memo)


def files_digest(path: Path, names: Iterable[str], memo: Path | None = None) -> str:
    """As of a folder of these files alone; names are relative to ``path``.

    Raises:
        ConfigError: one of them is missing.
    """
    names = sorted(names)
    digests = _digests([path / name for name in names], memo)
    sizes = [(path / name).stat().st_size for name in names]
    table = list(zip(names, sizes, digests, strict=True))
    return hashlib.sha256(json.dumps(table, separators=(",", ":")).encode()).hexdigest()


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UntrustedInput(f"{folder} is a link to a folder that holds it", fix="Remove the link.")
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{name}/", above | {here})
            elif entry.is_file():
                yield name
            else:
                raise UntrustedInput(f"{entry.path} is a broken link, a pipe or a device", fix="Remove it.")


def _digests(paths: list[Path], memo: Path | None) -> list[str]:
    known = _load(memo)
    found: list[str | None] = []
    stats: list[os.stat_result] = []
    for path in paths:
        try:
            stats.append(path.stat())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ConfigError(f"{path} does not exist", fix="Name an existing file.") from error
        found.append(known.get(_identity(stats[-1])))
    todo = [index for index, digest in enumerate(found) if digest is None]
    fresh: dict[str, str] = {}
    workers = min(4, os.cpu_count() or 1) if sum(stats[i].st_size for i in todo) >= _PARALLEL_FROM else 1
    with ThreadPoolExecutor(workers) as pool:
        for index, digest in zip(todo, pool.map(_hash, (paths[i] for i in todo)), strict=True):
            found[index] = digest
            status = stats[index]
            settled = time.time() - max(status.st_mtime, status.st_ctime) >= _SETTLED
            if settled and _identity(paths[index].stat()) == _identity(status):
                fresh[_identity(status)] = digest
    if memo is not None and fresh:
        _save(memo, fresh)
    return [digest for digest in found if digest is not None]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(status: os.stat_result) -> str:
    """What changes when a file does. Nobody can set the change time back, as `touch -d` does the other."""
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _load(memo: Path | None) -> dict[str, str]:
    if memo is None:
        return {}
    try:
        body = json.loads(memo.read_text(encoding="utf-8"))
        if body["format"] != _FORMAT or not isinstance(body["files"], dict):
            return {}
        return {str(key): str(value) for key, value in body["files"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a memory only: without it the files are read again


def _save(memo: Path, fresh: dict[str, str]) -> None:
    files = _load(memo) | fresh  # read again: another process may have written meanwhile
    files = dict(list(files.items())[-_MAX_ENTRIES:])
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{memo.name}-", dir=memo.parent)
    except OSError:
        return  # a full or read-only disk costs the memory, not the run
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"format": _FORMAT, "files": files}, file)
        os.replace(name, memo)
    except OSError:
        Path(name).unlink(missing_ok=True)
