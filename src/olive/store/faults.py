"""Which failures of the operating system are the machine's, and how they are told to the user."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from olive.errors import EnvironmentFault

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
_SPACE = "free space there, or put the store on another disk (`cache_dir` in the document)"
_REASONS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("a file would pass the file-size limit", "raise the limit (`ulimit -f unlimited`)"),
    errno.EMFILE: ("too many open files", "raise the limit (`ulimit -n 4096`)"),
    errno.ENFILE: ("the system has too many open files", "close other programs"),
    errno.EACCES: ("permission denied", "make the folder readable and writable for this user"),
    errno.EPERM: ("operation not permitted", "make the folder readable and writable for this user"),
    errno.EROFS: ("the file system is read-only", "use a folder that can be written"),
    errno.EIO: ("the disk reports an input/output error", "check the disk; nothing was removed"),
    errno.ENOLCK: ("the file system offers no locks", "use a local disk"),
    errno.ENOSYS: ("the file system offers no locks", "use a local disk"),
}
# Writers in native code (safetensors, torch, onnx) report a full disk as text, or only as a failed write.
_FULL_TEXTS = (
    ("No space left on device", errno.ENOSPC),
    ("StorageFull", errno.ENOSPC),
    ("os error 28", errno.ENOSPC),
    ("quota exceeded", errno.EDQUOT),
    ("os error 122", errno.EDQUOT),
    ("File too large", errno.EFBIG),
    ("os error 27", errno.EFBIG),
    ("] . unexpected pos", 0),  # torch.save, whatever the reason: PytorchStreamWriter's position check
)
_NOTHING_FREE = 1 << 16


def human(size: float) -> str:
    """Bytes for people: ``7.6 GB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def free_bytes(path: Path) -> int | None:
    """Bytes this user may still write beside ``path``; None where the system does not say."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None


def environment_fault(
    error: OSError, path: Path, doing: str, *, needed: int | None = None
) -> EnvironmentFault:
    """The error that tells the user what the machine refused.

    Args:
        error: what the system said.
        path: the folder or file concerned.
        doing: what was being done, e.g. ``storing the result``.
        needed: bytes the operation needs in all, where known.
    """
    number = error.errno or 0
    reason, fix = _REASONS.get(number, (error.strerror or str(error), "check the disk and its permissions"))
    named = f" ({error.filename})" if isinstance(error.filename, str) and error.filename != str(path) else ""
    message = f"{doing}: {reason}{named}"
    if number in FULL:
        free = free_bytes(path)
        amount = "more than is free" if needed is None else f"{human(needed)} ({needed} bytes)"
        left = "unknown" if free is None else f"{human(free)} ({free} bytes)"
        message = f"{doing}: {reason}: needs {amount}, free {left}"
    return EnvironmentFault(message, where=str(path), fix=fix)


def full_disk(error: BaseException, path: Path) -> OSError | None:
    """The full disk, quota or file-size limit behind ``error``; native code reports it as text only."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return seen
        text = str(seen)
        for words, number in _FULL_TEXTS:
            if words in text:
                return OSError(number or (errno.EFBIG if _size_limited() else errno.ENOSPC), words)
        seen = seen.__cause__ or seen.__context__
    free = free_bytes(path)
    if free is not None and free < _NOTHING_FREE:
        return OSError(errno.ENOSPC, "No space left on device")
    return None


def _size_limited() -> bool:
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


@contextlib.contextmanager
def reported(path: Path, doing: str, *, needed: int | None = None) -> Iterator[None]:
    """Turn a refusal of the operating system into an ``EnvironmentFault``.

    Raises:
        EnvironmentFault: any ``OSError`` inside.
    """
    try:
        yield
    except OSError as error:
        raise environment_fault(error, path, doing, needed=needed) from error
