"""Copy a file: share its blocks where the file system can, never link."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from olive.store.faults import FULL

_FICLONE = 0x40049409  # linux/fs.h: clone a whole file


def copy_file(source: Path, target: Path) -> None:
    """Copy one file, sharing its blocks where the file system can, and sync it; never a link.

    Raises:
        OSError: ENOSPC before a byte is written, where the file would not fit.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        if not _clone(reader.fileno(), writer.fileno()):
            size = os.fstat(reader.fileno()).st_size
            if shutil.disk_usage(target.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            shutil.copyfileobj(reader, writer, 4 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def _clone(reader: int, writer: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno in FULL:
            raise
        return False
    return True
