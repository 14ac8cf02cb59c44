"""Data files to rows, one at a time: JSON, JSON Lines, CSV, text and Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from olive.errors import ConfigError, EnvironmentFault

Row = dict[str, Any]
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 1024  # of a row group in memory at once


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file, past a byte order mark.

    Raises:
        EnvironmentFault: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_BOM)) != _BOM:
                file.seek(0)
            yield file
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error


def is_array(path: Path) -> bool:
    """Whether a JSON file is one array, which has to be read whole."""
    with opened(path) as file:
        return _begins_with_bracket(file)


def read_json(path: Path, file: BinaryIO) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    if _begins_with_bracket(file):
        yield from _array(path, file)
        return
    # Lines end at \n alone: JSON allows U+2028 inside a string.
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise malformed(path, number, getattr(error, "msg", str(error))) from error
        if not isinstance(item, dict):
            raise malformed(path, number, "not an object")
        yield item


def _begins_with_bracket(file: BinaryIO) -> bool:
    start = file.tell()
    first = b""
    while not first.strip() and (more := file.read(4096)):
        first = more
    file.seek(start)
    return first.lstrip()[:1] == b"["


def _array(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        items = json.loads(_decoded(path, file.read(), 0))
    except (ValueError, RecursionError) as error:
        raise malformed(path, getattr(error, "lineno", 1), getattr(error, "msg", str(error))) from error
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise ConfigError(f"{path}: item {index} of the array is not an object")
        yield item


def read_csv(path: Path, file: BinaryIO) -> Iterator[Row]:
    """A header, then as many cells in each row; cells stay as written."""
    # The csv module refuses cells over 128 KiB unless told otherwise, process-wide.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    reader = csv.DictReader(text, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                names = ", ".join(reader.fieldnames or ())
                raise malformed(
                    path, reader.line_num, f"this row does not have the header's columns: {names}"
                )
            yield dict(row)
    except csv.Error as error:
        raise malformed(path, reader.line_num, str(error)) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, reader.line_num + 1, error) from error
    finally:
        text.detach()


def read_text(path: Path, file: BinaryIO) -> Iterator[Row]:
    """One row a line."""
    some = False
    for _, line in _lines(path, file):
        some = True
        yield {"text": line.removesuffix("\n").removesuffix("\r")}
    if not some:
        yield {"text": ""}


def read_parquet(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Rows of each row group, some at a time."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EnvironmentFault(
            "reading Parquet needs pyarrow", fix="pip install 'olive-next[cpu]'"
        ) from error
    try:
        with parquet.ParquetFile(file) as source:
            for batch in source.iter_batches(batch_size=_PARQUET_ROWS):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}") from error


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    place = file.tell()
    for number, line in enumerate(file, 1):
        yield number, _decoded(path, line, place)
        place += len(line)


def _decoded(path: Path, content: bytes, place: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {place + error.start} is {content[error.start]:#04x}",
            fix="save the file as UTF-8",
        ) from error


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(
        f"{path} is not UTF-8: near line {line} there is {error.object[error.start]:#04x}",
        fix="save the file as UTF-8",
    )


def malformed(path: Path, line: int, message: str) -> ConfigError:
    """What to say of a line that is not what the file's other lines are."""
    return ConfigError(
        message,
        where=f"{path}:{line}",
        fix="JSON data is one array of objects, or one object a line" if path.suffix != ".csv" else None,
    )


READERS: dict[str, Callable[[Path, BinaryIO], Iterable[Row]]] = {
    "json": read_json,
    "jsonl": read_json,
    "csv": read_csv,
    "text": read_text,
    "parquet": read_parquet,
}
