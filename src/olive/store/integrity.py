"""Manifests: what a folder of files must hold, to the byte, and whether it still does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from olive.errors import PassFailed
from olive.store.copying import copy_file
from olive.store.faults import GONE

MANIFEST = "manifest.json"
FILES = "files"
FORMAT = 1
FileTable = dict[str, tuple[int, str]]  # name relative to the folder -> (bytes, sha256 hex)
_PARALLEL_FROM = 64 << 20


class DamagedError(Exception):
    """The bytes on disk are not those that were stored."""


def file_digest(path: Path) -> str:
    """sha256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below ``folder``: relative posix name and status (of a link itself)."""
    pending = [folder]
    while pending:
        here = pending.pop()
        with os.scandir(here) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    pending.append(Path(item.path))
                else:
                    name = Path(item.path).relative_to(folder).as_posix()
                    yield name, item.stat(follow_symlinks=False)


def size_of(folder: Path) -> int:
    """Bytes of all files below ``folder``; 0 where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return sum(status.st_size for _, status in walk(folder))
    return 0


def tabulate(folder: Path) -> FileTable:
    """Size and sha256 of every file below ``folder``."""
    sizes = {name: status.st_size for name, status in walk(folder)}
    names = sorted(sizes)
    return {name: (sizes[name], sha) for name, sha in zip(names, _digests(folder, names, sizes), strict=True)}


def _digests(folder: Path, names: list[str], sizes: dict[str, int]) -> list[str]:
    paths = [folder / name for name in names]
    if len(names) < 2 or sum(sizes.values()) < _PARALLEL_FROM:
        return [file_digest(path) for path in paths]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(file_digest, paths))


def table_digest(files: FileTable) -> str:
    """One sha256 for a folder: over name, size and sha256 of every file, in order of the name."""
    text = json.dumps([[name, *files[name]] for name in sorted(files)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def settle(folder: Path) -> None:
    """Make a staged folder fit to store: regular files only, no hard links, everything on the disk.

    ONNX refuses external data with more than one link, and a link would let a stored file change from
    outside.

    Raises:
        PassFailed: it holds a symbolic link, a pipe or a device.
    """
    folders = {folder}
    for name, status in list(walk(folder)):
        path = folder / name
        if not stat.S_ISREG(status.st_mode):
            raise PassFailed(
                f"the result holds {name}, which is no regular file",
                fix="Pass developer: copy the file a link points to into ctx.out.",
            )
        if status.st_nlink > 1:
            _unlink_hard(path)
        sync(path)
        folders.update(parent for parent in path.parents if parent.is_relative_to(folder))
    for one in folders:
        sync(one)


def _unlink_hard(path: Path) -> None:
    alone = path.with_name(f"{path.name}.olive-copy")
    copy_file(path, alone)
    os.replace(alone, path)


def sync(path: Path) -> None:
    """Ask the disk to keep what was written to this file or folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write ``folder/manifest.json``: the body and its own sha256, synced to disk."""
    text = _spell(body)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": body}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(sealed, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The body of ``folder/manifest.json``.

    Raises:
        DamagedError: it is missing, unparseable, edited, or of another format.
        OSError: it cannot be read for another reason: that is no damage.
    """
    try:
        sealed = json.loads((folder / MANIFEST).read_bytes())
        body = sealed["body"]
        if hashlib.sha256(_spell(body).encode()).hexdigest() != sealed["sha256"]:
            raise DamagedError("the manifest was changed")
        if body["format"] != FORMAT:
            raise DamagedError(f"the manifest has format {body['format']}, this version reads {FORMAT}")
    except OSError as error:
        raise _judge(error, "the manifest") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"the manifest is unreadable: {error}") from error
    return dict(body)


def check_files(folder: Path, files: FileTable, *, content: bool) -> None:
    """Hold the files below ``folder`` against the table: exact set, sizes and, if asked, content.

    Raises:
        DamagedError: they differ.
        OSError: a file cannot be read for another reason: that is no damage.
    """
    try:
        found = dict(walk(folder))
        if found.keys() != files.keys():
            odd = sorted(found.keys() ^ files.keys())
            raise DamagedError(f"{odd[0]} is {'not listed' if odd[0] in found else 'missing'}")
        for name, (size, _) in files.items():
            if not stat.S_ISREG(found[name].st_mode):
                raise DamagedError(f"{name} is no regular file")
            if found[name].st_size != size:
                raise DamagedError(f"{name} has {found[name].st_size} bytes, {size} were stored")
        if content:
            names = sorted(files)
            sizes = {name: size for name, (size, _) in files.items()}
            for name, sha in zip(names, _digests(folder, names, sizes), strict=True):
                if sha != files[name][1]:
                    raise DamagedError(f"{name} has other content than was stored")
    except OSError as error:
        raise _judge(error, "a file") from error


def parse_table(value: Any) -> FileTable:
    """The file table as a manifest holds it.

    Raises:
        DamagedError: it has another shape.
    """
    try:
        return {str(name): (int(size), str(sha)) for name, (size, sha) in dict(value).items()}
    except (TypeError, ValueError) as error:
        raise DamagedError(f"the file table is unreadable: {error}") from error


def _judge(error: OSError, what: str) -> Exception:
    if error.errno in GONE:
        return DamagedError(f"{what} is missing: {error.filename}")
    return error


def _spell(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
