"""A data config to rows: plain dictionaries, one a sample.

JSON, JSON Lines, CSV, text and Parquet files are read directly, so that planning imports nothing heavy.
Hub names, local dataset folders and remote files go through ``datasets``.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from olive.config.workflow import DataConfig
from olive.data import mixture
from olive.data.readers import READERS, opened
from olive.data.slices import Slice, bounds, parse_split, take
from olive.errors import ConfigError, EnvironmentFault, OliveError, UntrustedInput

Row = dict[str, Any]


def read(config: DataConfig, base_dir: Path, first: int | None = None) -> list[Row]:
    """Every row of the config's split in file order, less what ``max_rows`` leaves out; the rows of a mix.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.
        first: give no more than so many; what is behind them need not be read.

    Raises:
        ConfigError: a file is missing or malformed, the split does not exist, or there are no rows.
        EnvironmentFault: a library is missing, or a hub dataset is neither cached nor reachable.
        UntrustedInput: the dataset wants to run code.
    """
    if config.mix:
        return list[Row](_mix(config, base_dir))[:first]
    if first is not None:
        rows = list(islice(iterate(config, base_dir), first))
        if not rows:
            raise no_rows(config)
        return rows
    found = files(config, base_dir)
    if found is None:
        rows = [dict(row) for row in _through_datasets(config, base_dir)]
    else:
        rows = []
        for part in _parts(config, found):
            rows.extend(take(list(_file_rows(config, found[part.split])), part))
    if not rows:
        raise no_rows(config)
    limit = config.load_dataset_config.max_rows
    return rows if limit is None or limit >= len(rows) else mixture.choice(rows, limit, "max_rows")


def iterate(config: DataConfig, base_dir: Path) -> Iterator[Row]:
    """The rows that ``read`` gives, one at a time, and none when there are none; not those of a mix.

    A slice by percentages and ``max_rows`` need the number of rows first: the files are read once more.

    Raises:
        ConfigError, EnvironmentFault, UntrustedInput: as ``read``.
    """
    limit = config.load_dataset_config.max_rows
    if limit is None:
        yield from _split_rows(config, base_dir)
        return
    count = sum(1 for _ in _split_rows(config, base_dir))
    chosen = iter(range(count) if limit >= count else mixture.choice(range(count), limit, "max_rows"))
    wanted = next(chosen, None)
    for index, row in enumerate(_split_rows(config, base_dir)):
        if index == wanted:
            yield row
            wanted = next(chosen, None)


def count(config: DataConfig, base_dir: Path) -> int:
    """Rows that ``iterate`` gives."""
    if files(config, base_dir) is None:
        found = len(_through_datasets(config, base_dir))
        return min(found, config.load_dataset_config.max_rows or found)
    return sum(1 for _ in iterate(config, base_dir))


def _split_rows(config: DataConfig, base_dir: Path) -> Iterator[Row]:
    found = files(config, base_dir)
    if found is None:
        yield from map(dict, _through_datasets(config, base_dir))
        return
    for part in _parts(config, found):
        paths = found[part.split]
        start, stop = bounds(part, partial(_count, config, paths))
        yield from islice(_file_rows(config, paths), start, stop)


def _count(config: DataConfig, paths: Iterable[Path]) -> int:
    return sum(1 for _ in _file_rows(config, paths))


def _file_rows(config: DataConfig, paths: Iterable[Path]) -> Iterator[Row]:
    reader = READERS[config.load_dataset_config.data_name]
    for path in paths:
        with opened(path) as file:
            yield from reader(path, file)


def no_rows(config: DataConfig) -> ConfigError:
    """What to say of a split without rows."""
    return ConfigError(
        f"split {config.load_dataset_config.split!r} of data config {config.name!r} has no rows",
        where=where(config),
        fix="check `split` and the contents of `data_files`",
    )


def members(config: DataConfig) -> tuple[DataConfig, ...]:
    """The data configs of a mix.

    Raises:
        ConfigError: they are not known.
    """
    if len(config.members) != len(config.mix):
        names = ", ".join(part.name for part in config.mix)
        raise ConfigError(
            f"the mix {config.name!r} does not know its data configs: {names}",
            where=where(config),
            fix="each must be in data_configs and must not have its rows from the mix",
        )
    return config.members


def _mix(config: DataConfig, base_dir: Path) -> list[mixture.MixedRow]:
    parts = []
    for member, part in zip(members(config), config.mix, strict=True):
        rows = read(member, base_dir)
        try:
            tagged = mixture.tagged(rows, member.name, member.pre_process_data_config)
        except ConfigError as error:
            raise ConfigError(problems=[replace(p, where=where(member)) for p in error.problems]) from error
        parts.append((tagged, part.weight))
    mixed = mixture.mixed(parts, config.pre_process_data_config.random_seed or 0)
    if not mixed:
        raise empty_mix(config)
    return mixed


def empty_mix(config: DataConfig) -> ConfigError:
    """What to say of a mix of which every part gives nothing."""
    return ConfigError(f"the mix {config.name!r} has no rows", where=where(config), fix="raise the weights")


def columns(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of all columns, in order of first appearance."""
    return tuple(dict.fromkeys(name for row in rows for name in row))


def where(config: DataConfig) -> str:
    """How messages name this config."""
    return f"data_configs[{config.name}]"


def is_local(config: DataConfig, base_dir: Path) -> bool:
    """Whether the rows can be read without a network."""
    if config.mix:
        return all(is_local(member, base_dir) for member in members(config))
    return files(config, base_dir) is not None or folder(config, base_dir) is not None


def folder(config: DataConfig, base_dir: Path) -> Path | None:
    """The local dataset folder the config names, or None."""
    load = config.load_dataset_config
    if load.data_name in READERS:
        return base_dir / load.data_dir if load.data_dir is not None else None
    path = base_dir / load.data_name
    return path if path.is_dir() else None


def files(config: DataConfig, base_dir: Path) -> dict[str, tuple[Path, ...]] | None:
    """The local files of each split that ``read`` reads itself; None when ``datasets`` has to load it.

    Raises:
        ConfigError: a named file does not exist, or a file loader names no file.
    """
    load = config.load_dataset_config
    if load.data_name not in READERS:
        return None
    if load.data_files is None:
        if load.data_dir is None:
            raise ConfigError(
                f"data config {config.name!r} loads {load.data_name!r} but names no file",
                where=where(config),
                fix="set `data_files` in load_dataset_config",
            )
        return None
    named = load.data_files if isinstance(load.data_files, dict) else {"train": load.data_files}
    by_split = {split: (value,) if isinstance(value, str) else tuple(value) for split, value in named.items()}
    if any("://" in name for names in by_split.values() for name in names):
        return None
    root = base_dir / load.data_dir if load.data_dir else base_dir
    return {
        split: tuple(path for name in names for path in _expand(config, root, name))
        for split, names in by_split.items()
    }


def _expand(config: DataConfig, root: Path, name: str) -> list[Path]:
    path = root / name
    if path.is_file():
        return [path]
    if glob.has_magic(name):
        matches = sorted(glob.glob(str(path), recursive=True))
        if matches:
            return [Path(match) for match in matches if Path(match).is_file()]
    if path.is_dir():
        raise ConfigError(
            f"data file {name!r} is a folder: {path.absolute()}",
            where=where(config),
            fix=f"name the files, for example {name.rstrip('/')}/*.json",
        )
    near = sorted(entry.name for entry in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
    hint = f"; that folder has {', '.join(near[:5])}" if near else ""
    raise ConfigError(
        f"data file {name!r} does not exist: looked at {path.absolute()}",
        where=where(config),
        fix=f"correct `data_files`, or run from the folder it is relative to{hint}",
    )


def _parts(config: DataConfig, found: Mapping[str, Any]) -> tuple[Slice, ...]:
    """The terms of the split, all of which are there."""
    parts = parse_split(config.load_dataset_config.split)
    if parts is None:
        raise ConfigError(
            f"split {config.load_dataset_config.split!r} cannot be read",
            where=where(config),
            fix="write a name, a slice such as train[:10%] or train[100:200], or several joined by +",
        )
    for part in parts:
        if part.split not in found:
            raise _unknown_split(config, part.split, found)
    return parts


def _unknown_split(config: DataConfig, split: str, known: Iterable[str]) -> ConfigError:
    names = sorted(known)
    return ConfigError(
        f"data config {config.name!r} has no split {split!r}; it has {', '.join(names)}",
        where=where(config),
        fix=f'set "split": "{names[0]}"' if names else "check `data_files`",
    )


def _through_datasets(config: DataConfig, base_dir: Path) -> Any:
    """A dataset of the package datasets: its rows are mapped from the cache on disk, not held."""
    load = config.load_dataset_config
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentFault(
            f"loading dataset {load.data_name!r} needs the package datasets",
            where=where(config),
            fix="pip install 'olive-next[cpu]'",
        ) from error
    local = folder(config, base_dir)
    builder = load.data_name in READERS
    name = {"jsonl": "json"}.get(load.data_name, load.data_name)
    try:
        dataset = datasets.load_dataset(
            name if builder or local is None else str(local),
            load.subset,
            split=load.split,
            data_dir=str(local) if builder and local is not None else load.data_dir,
            data_files=_plain(load.data_files),
            revision=load.revision,
        )
    except RuntimeError as error:
        if "scripts" in str(error):
            raise UntrustedInput(
                f"dataset {load.data_name!r} wants to run code of its own",
                where=where(config),
                fix="use a version of it that is plain data files (a Parquet branch of the same dataset)",
            ) from error
        raise _load_fault(config, local, error) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _load_fault(config, local, error) from error
    return dataset


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _load_fault(config: DataConfig, local: Path | None, error: Exception) -> OliveError:
    load = config.load_dataset_config
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if local is not None or (isinstance(error, ValueError) and "split" in str(error).lower()):
        return ConfigError(
            f"cannot load split {load.split!r} of {load.data_name!r}: {said}", where=where(config)
        )
    return EnvironmentFault(
        f"dataset {load.data_name!r} is no local folder, not cached, and could not be fetched: {said}",
        where=where(config),
        fix="check the name and the network, or give local files: data_name json, data_files PATH",
    )
