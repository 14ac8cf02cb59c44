"""Deliver a stored result into a folder of the user's: whole or not at all, and never over somebody's files.

Files are cloned where the file system can, else copied: ONNX refuses external data that has a second hard
link or is a symbolic link out of its folder. A marker beside the files lists what we wrote; only that is ever
replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

from olive.errors import ConfigError
from olive.store.copying import copy_file
from olive.store.integrity import DamagedError, FileTable, check_files, file_digest, parse_table, sync, walk

MARKER = ".olive-output.json"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EXDEV, errno.ENOTSUP, errno.EPERM})


def materialise(source: Path, files: FileTable, digest: str, created: float, dest: Path) -> Path:
    """Put a copy of ``source`` at ``dest``, replacing at once what we delivered there before.

    The caller makes sure that one process at a time delivers to ``dest``.

    Args:
        source: folder of the stored files.
        files: what it holds.
        digest: of that table.
        created: modification time the copies get, so that a later edit shows.
        dest: the folder; its parents are made. A symbolic link is followed.

    Returns:
        The folder, resolved.

    Raises:
        ConfigError: ``dest`` is a file, or holds files that are not ours or were edited; nothing is touched.
        OSError: the machine refused; ``dest`` is as it was.
    """
    dest = dest.expanduser().resolve()
    dest.parent.mkdir(parents=True, exist_ok=True)
    _tidy(dest)
    if (marker := _refuse_foreign(dest)) is not None and marker == digest and _intact(dest, files):
        return dest
    fresh = dest.with_name(f".{dest.name}.olive-{uuid.uuid4().hex}.tmp")
    try:
        _fill(fresh, source, files, digest, created)
        if dest.exists() and any(dest.iterdir()):
            _swap(fresh, dest)
            _still_ours(fresh, dest)
        else:
            os.rename(fresh, dest)
        sync(dest.parent)
    finally:
        _remove_ours(fresh)
    return dest


def refusal(dest: Path) -> str | None:
    """Why ``materialise`` would refuse ``dest``; None when it would not. Nothing is touched."""
    try:
        _refuse_foreign(dest.expanduser().resolve())
    except ConfigError as error:
        return error.problems[0].message
    return None


def _fill(fresh: Path, source: Path, files: FileTable, digest: str, created: float) -> None:
    fresh.mkdir()
    with (fresh / MARKER).open("w", encoding="utf-8") as file:
        json.dump({"digest": digest, "time": created, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    folders = {fresh}
    for name in files:
        target = fresh / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, target)
        os.utime(target, (created, created))
        folders.update(parent for parent in target.parents if parent.is_relative_to(fresh))
    for folder in folders:
        sync(folder)


def _refuse_foreign(dest: Path) -> str | None:
    """Digest of what we delivered to ``dest`` before, None when it is free.

    Raises:
        ConfigError: it holds something else.
    """
    if not dest.exists():
        return None
    if not dest.is_dir():
        raise _refusal(dest, "is a file")
    marker = _marker(dest)
    for name, status in walk(dest):
        if name == MARKER:
            continue
        if marker is None or name not in marker[1]:
            raise _refusal(dest, f"holds {name}, which this product did not put there")
        if (status.st_size, status.st_mtime) != (marker[1][name][0], marker[2]) and (
            not _same(dest / name, marker[1][name])
        ):
            raise _refusal(dest, f"holds {name}, which was changed after it was delivered")
    return marker[0] if marker else None


def _refusal(dest: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the output folder {dest} {why}; it was left as it is",
        where=str(dest),
        fix="name another output folder, or move those files away",
    )


def _marker(folder: Path) -> tuple[str, FileTable, float] | None:
    try:
        value = json.loads((folder / MARKER).read_bytes())
        files = parse_table(value["files"])
        if any(".." in Path(name).parts or Path(name).is_absolute() for name in files):
            return None
        return str(value["digest"]), files, float(value["time"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, DamagedError):
        return None


def _same(path: Path, expected: tuple[int, str]) -> bool:
    return path.is_file() and not path.is_symlink() and file_digest(path) == expected[1]


def _intact(dest: Path, files: FileTable) -> bool:
    """Whether ``dest`` holds exactly these files, by content."""
    kept = {name: status for name, status in walk(dest) if name != MARKER}
    if kept.keys() != files.keys() or any(status.st_nlink > 1 for status in kept.values()):
        return False
    try:
        check_files(dest, {**files, MARKER: _entry(dest / MARKER)}, content=True)
    except DamagedError:
        return False
    return True


def _entry(path: Path) -> tuple[int, str]:
    return path.stat().st_size, file_digest(path)


def _still_ours(old: Path, dest: Path) -> None:
    """A file that somebody put into the folder between our look and the exchange brings the folder back."""
    try:
        _refuse_foreign(old)
    except ConfigError as error:
        _swap(old, dest)
        raise ConfigError(str(error).replace(str(old), str(dest))) from error


def _swap(fresh: Path, dest: Path) -> None:
    """Exchange two folders at once; where the system cannot, one after the other (``_tidy`` mends a kill)."""
    try:
        exchange = _renameat2()
    except (OSError, AttributeError):
        exchange = None
    if exchange is not None:
        number = exchange(os.fsencode(fresh), os.fsencode(dest))
        if number == 0:
            return
        if number not in _NO_EXCHANGE:
            raise OSError(number, os.strerror(number), str(dest))
    old = dest.with_name(f".{dest.name}.olive-{uuid.uuid4().hex}.old")
    os.rename(dest, old)
    os.rename(fresh, dest)
    os.rename(old, fresh)


def _renameat2() -> Callable[[bytes, bytes], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).renameat2

    def exchange(first: bytes, second: bytes) -> int:
        failed = function(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
        return ctypes.get_errno() if failed else 0

    return exchange


def _tidy(dest: Path) -> None:
    """Put back and remove what a killed delivery to ``dest`` left beside it."""
    for path in list(dest.parent.glob(f".{glob.escape(dest.name)}.olive-*")):
        if path.is_symlink() or not path.is_dir():
            continue
        if path.suffix == ".old" and not dest.exists():
            os.rename(path, dest)
        elif path.suffix in (".old", ".tmp"):
            _remove_ours(path)


def _remove_ours(folder: Path) -> None:
    """Remove a folder of ours: the files its marker lists, and the folders that are then empty."""
    marker = _marker(folder) if folder.is_dir() else None
    for name in (*(marker[1] if marker else ()), MARKER):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for here, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(here)
