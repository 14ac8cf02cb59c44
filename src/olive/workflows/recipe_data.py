"""Where the rows of a dataset are, and which of them are held out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from olive.config.suggest import closest
from olive.config.workflow import DataConfig, LoadDataset
from olive.data.rows import Row, read
from olive.data.template import Text
from olive.errors import ConfigError, OliveError
from olive.resources.resolve import is_hub_id

SUFFIXES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
_BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json")
_ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MOST = 1000  # rows held out by default; more are slow to measure and hardly make the figure surer
_PIECES = 10  # of a held-out part that is spread over the rows
_UNEVEN = 0.2  # share of the labels that may differ between the last rows and all, before they are spread


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from.

    Attributes:
        load: the ``load_dataset_config``.
        rows: the rows; None for a hub dataset that is not read yet.
        validation: the ``load_dataset_config`` of a held-out part that the folder brings.
        kind: what it is, for people.
    """

    load: dict[str, Any]
    rows: list[Row] | None
    kind: str
    validation: dict[str, Any] | None = None


def find(data: str, split: str, base_dir: Path, *, option: str = "--data", download: bool = False) -> Source:
    """The rows that a file, a folder or a hub name stands for.

    Args:
        data: as the user wrote it.
        split: which split.
        base_dir: folder that relative paths are looked up in.
        option: what the user wrote it after.
        download: read a hub dataset through the package datasets, which fetches it.

    Raises:
        OliveError: there is no such thing, it is of no known kind, it is malformed, or it has no rows.
    """
    path = base_dir / data
    if path.is_dir():
        return _folder(data, split, base_dir, option)
    suffix = Path(data).suffix.lower()
    if path.is_file():
        if suffix not in SUFFIXES:
            raise ConfigError(
                f"{data} ends with {suffix or 'no suffix'}, which is no kind of data file",
                where=option,
                fix=f"Known are {', '.join(SUFFIXES)}.",
            )
        load = {"data_name": SUFFIXES[suffix], "data_files": data, "split": split}
        return Source(load, rows_of(load, base_dir, option), f"a {SUFFIXES[suffix]} file")
    if suffix in SUFFIXES or not is_hub_id(data):
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = closest(path.name, sorted(names))
        fix = f"did you mean {Path(data).parent / near}?" if near else f"looked at {path.absolute()}"
        raise ConfigError(f"there is no file {data}", where=option, fix=fix)
    load = {"data_name": data, "split": split}
    return Source(load, rows_of(load, base_dir, option) if download else None, "a dataset of the hub")


def rows_of(load: Mapping[str, Any], base_dir: Path, option: str) -> list[Row]:
    """The rows of a ``load_dataset_config``; a fault is told to the one who wrote ``option``."""
    name = "train" if option == "--data" else "held_out"
    try:
        return read(DataConfig(name=name, load_dataset_config=LoadDataset.model_validate(load)), base_dir)
    except OliveError as error:
        ours = f"data_configs[{name}]"
        raise type(error)(
            problems=[
                replace(problem, where=option if problem.where in (None, ours) else problem.where)
                for problem in error.problems
            ]
        ) from error


def _folder(data: str, split: str, base_dir: Path, option: str) -> Source:
    root = base_dir / data
    inside = [path for path in sorted(root.rglob("*")) if path.is_file()]
    names = [path.relative_to(root) for path in inside]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    known = [name for name in names if name.suffix.lower() in SUFFIXES and name.name not in _BESIDE]
    kinds = Counter(SUFFIXES[name.suffix.lower()] for name in known)
    if len(kinds) != 1:
        held = ", ".join(str(name) for name in names[:5]) or "nothing"
        what = "files of several kinds" if kinds else "no data file"
        raise ConfigError(
            f"folder {data} holds {what}: {held}",
            where=option,
            fix="Name the file itself." if kinds else f"Known are {', '.join(SUFFIXES)}.",
        )
    (kind,) = kinds
    files: dict[str, list[str]] = {}
    for name in known:
        words = re.split(r"[^a-z]+", str(name).lower())
        role = next((_ROLES[word] for word in words if word in _ROLES), "train")
        files.setdefault(role, []).append(str(Path(data) / name))
    shown = {role: found if len(found) > 1 else found[0] for role, found in files.items()}
    only = shown["train"] if list(shown) == ["train"] else shown
    load: dict[str, Any] = {"data_name": kind, "data_files": only, "split": split}
    validation = {**load, "split": "validation"} if "validation" in files and "train" in files else None
    return Source(load, rows_of(load, base_dir, option), f"a folder of {kind} files", validation)


@dataclass(frozen=True, slots=True)
class Parts:
    """The two parts of a split, as split expressions."""

    train: str
    held_out: str


def held_out_rows(size: float | None, rows: int) -> int:
    """How many rows to hold out: ``size`` below 1 is a share, from 1 on a number; default a tenth.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    share = 0.1 if size is None else size
    count = ceil(round(share * rows, 9)) if share < 1 else int(share)
    if count >= rows:
        raise ConfigError(
            f"{share:g} held out leaves nothing of {rows} rows to train on",
            where="--eval-size",
            fix="Give a share such as 0.1, or a smaller number.",
        )
    return min(count, _MOST) if size is None else count


def hold_out_unread(split: str, size: float) -> Parts:
    """The last rows of a split whose length is not known."""
    start = f"{100 - max(1, round(size * 100))}%" if size < 1 else f"-{int(size)}"
    return Parts(f"{split}[:{start}]", f"{split}[{start}:]")


def hold_out(split: str, texts: Sequence[Text], count: int) -> Parts | None:
    """A held-out part that a document can name: the last rows, or rows spread evenly where those differ.

    Args:
        split: a plain split name.
        texts: every row, rendered.
        count: how many rows to hold out.

    Returns:
        The parts; None where more than one in a hundred held-out rows would also be trained on.
    """
    rows = len(texts)
    pieces = min(_PIECES, count)
    ends = [(piece + 1) * rows // pieces for piece in range(pieces)]
    sizes = [(piece + 1) * count // pieces - piece * count // pieces for piece in range(pieces)]
    last = [(rows - count, rows)]
    spread = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    labelled = len({text.answer for text in texts}) <= 20
    for ranges in (last, spread):
        if _repeated(texts, ranges) * 100 > count:
            continue
        if ranges is spread or not labelled or _difference(texts, ranges) <= _UNEVEN:
            return _named(split, ranges, rows, count)
    return None


def _named(split: str, ranges: Sequence[tuple[int, int]], rows: int, count: int) -> Parts:
    if len(ranges) == 1:
        return Parts(f"{split}[:-{count}]", f"{split}[-{count}:]")
    starts = [0, *(stop for _, stop in ranges)]
    stops = [*(start for start, _ in ranges), rows]
    kept = [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
    named = ["+".join(f"{split}[{start}:{stop}]" for start, stop in part) for part in (kept, ranges)]
    return Parts(named[0], named[1])


def _repeated(texts: Sequence[Text], ranges: Sequence[tuple[int, int]]) -> int:
    """How many rows of the ranges are also outside them."""
    held = {index for start, stop in ranges for index in range(start, stop)}
    outside = {text.full for index, text in enumerate(texts) if index not in held}
    return sum(texts[index].full in outside for index in held)


def _difference(texts: Sequence[Text], ranges: Sequence[tuple[int, int]]) -> float:
    """Total variation distance between the answers in the ranges and all answers."""
    held = Counter(text.answer for start, stop in ranges for text in texts[start:stop])
    whole, total = Counter(text.answer for text in texts), held.total()
    return sum(abs(held[x] / total - count / len(texts)) for x, count in whole.items()) / 2
