"""How large data is, whether it is read as a stream, and a sample of it for the plan."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from olive.config.workflow import DataConfig
from olive.data import mixture, rows
from olive.data.readers import READERS, Row, is_array, opened
from olive.data.slices import parse_split, take
from olive.errors import ConfigError

# What a byte of JSON Lines takes in memory as rows, texts and tokens; see benchmarks/streaming.py.
IN_MEMORY = 28
SHARE = 0.5  # of the free memory that data may take
_SAMPLED = 2_000  # rows that a plan looks at
_PACKED = {"parquet": 4}  # bytes of rows in a byte of a file


@dataclass(frozen=True, slots=True)
class Sample:
    """The first rows of data.

    Attributes:
        rows: the rows.
        total: how many there are in all, about.
    """

    rows: list[Row]
    total: int


def size_on_disk(config: DataConfig, base_dir: Path) -> int:
    """Bytes of the files that rows are read from; 0 where they are not on this machine.

    A part of a mix counts as often as it is taken.
    """
    if config.mix:
        members = zip(rows.members(config), config.mix, strict=True)
        return int(sum(size_on_disk(member, base_dir) * max(1.0, part.weight) for member, part in members))
    found = rows.files(config, base_dir)
    if found is not None:
        terms = parse_split(config.load_dataset_config.split) or ()
        paths = {path for term in terms for path in found.get(term.split, ())}
        size = sum(path.stat().st_size for path in paths)
        return size * _PACKED.get(config.load_dataset_config.data_name, 1)
    folder = rows.folder(config, base_dir)
    if folder is None or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def streams(config: DataConfig, base_dir: Path, memory: int, *, pairs: bool = False) -> bool:
    """Whether rows are read as a stream: because the config says so, or because they are large.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.
        memory: free bytes.
        pairs: rows are read as pairs of answers, which are held in memory.

    Raises:
        ConfigError: the config says so, and cannot have it: pairs, or a file that is one JSON array.
    """
    asked = [part.load_dataset_config.streaming for part in _leaves(config)]
    arrays = [path for part in _leaves(config) for path in _arrays(part, base_dir)]
    if any(asked):
        if pairs:
            raise ConfigError(
                "streaming is true, and pairs of answers are held in memory",
                where=rows.where(config),
                fix="leave streaming out; use max_rows where they are too many",
            )
        if arrays:
            raise ConfigError(
                f"streaming is true, and {arrays[0]} is one JSON array, which has to be read whole",
                where=rows.where(config),
                fix="write one object a line",
            )
        return True
    if False in asked or arrays or pairs:
        return False
    return size_on_disk(config, base_dir) * IN_MEMORY > SHARE * memory


def _leaves(config: DataConfig) -> list[DataConfig]:
    if not config.mix:
        return [config]
    return [leaf for member in rows.members(config) for leaf in _leaves(member)]


def _arrays(config: DataConfig, base_dir: Path) -> list[Path]:
    found = rows.files(config, base_dir)
    if found is None or config.load_dataset_config.data_name not in ("json", "jsonl"):
        return []
    return [path for paths in found.values() for path in paths if is_array(path)]


def sample(config: DataConfig, base_dir: Path, count: int = _SAMPLED) -> Sample:
    """The first rows of each split of the config, and about how many there are.

    The number is told from how many bytes those rows take; of Parquet files and dataset folders it is known.

    Raises:
        ConfigError: as ``rows.read``.
    """
    if config.mix:
        found = [sample(member, base_dir, count) for member in rows.members(config)]
        members = zip(rows.members(config), found, config.mix, strict=True)
        drawn = [
            (mixture.tagged(one.rows, member.name, member.pre_process_data_config), part.weight)
            for member, one, part in members
        ]
        mixed = mixture.mixed(drawn, config.pre_process_data_config.random_seed or 0)
        if not mixed:
            raise rows.empty_mix(config)
        in_all = sum(one.total * part.weight for one, part in zip(found, config.mix, strict=True))
        return Sample(list[Row](mixed), max(len(mixed), round(in_all)))
    got = list(islice(rows.iterate(_unlimited(config), base_dir), count))
    if not got:
        raise rows.no_rows(config)
    limit = config.load_dataset_config.max_rows
    total = max(1, min(_total(config, base_dir, count), limit or sys.maxsize))
    return Sample(got[:total], total)


def _unlimited(config: DataConfig) -> DataConfig:
    """The config without what needs the number of its rows: its first rows stand for all."""
    load = config.load_dataset_config
    terms = parse_split(load.split) or ()
    names = {term.split for term in terms if term.percent or min(term.start or 0, term.stop or 0) < 0}
    split = "+".join(dict.fromkeys(term.split for term in terms)) if names else load.split
    plain = load.model_copy(update={"max_rows": None, "split": split})
    return config.model_copy(update={"load_dataset_config": plain})


def _total(config: DataConfig, base_dir: Path, count: int) -> int:
    """About how many rows the split has."""
    found = rows.files(config, base_dir)
    if found is None:
        return rows.count(config, base_dir)
    kind = config.load_dataset_config.data_name
    totals: dict[str, int] = {}
    for name, paths in found.items():
        totals[name] = _parquet_rows(paths) if kind == "parquet" else _estimate(kind, paths, count)
    terms = parse_split(config.load_dataset_config.split) or ()
    return sum(len(take(range(totals.get(term.split, 0)), term)) for term in terms)


def _estimate(kind: str, paths: Sequence[Path], count: int) -> int:
    seen, used, size = 0, 0, sum(path.stat().st_size for path in paths)
    for path in paths:
        with opened(path) as file:
            seen += sum(1 for _ in islice(READERS[kind](path, file), count - seen))
            used += file.tell()
        if seen >= count:
            break
    return round(seen * size / used) if used else seen


def _parquet_rows(paths: Sequence[Path]) -> int:
    import pyarrow.parquet as parquet

    total: Any = sum(parquet.ParquetFile(path).metadata.num_rows for path in paths)
    return int(total)
