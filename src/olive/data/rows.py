"""A data config to rows: plain dictionaries, one a sample.

JSON, JSON Lines, CSV, text and Parquet files are read directly, so that planning imports nothing heavy.
Hub names, local dataset folders and remote files go through ``datasets``.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from olive.config.workflow import DataConfig
from olive.data import mixture
from olive.data.slices import Slice, parse_split, take
from olive.errors import ConfigError, EnvironmentFault, OliveError, UntrustedInput

Row = dict[str, Any]


def read(config: DataConfig, base_dir: Path) -> list[Row]:
    """Every row of the config's split in file order, less what ``max_rows`` leaves out; the rows of a mix.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.

    Raises:
        ConfigError: a file is missing or malformed, the split does not exist, or there are no rows.
        EnvironmentFault: a library is missing, or a hub dataset is neither cached nor reachable.
        UntrustedInput: the dataset wants to run code.
    """
    if config.mix:
        return list(_mix(config, base_dir))
    found = files(config, base_dir)
    if found is None:
        rows = _through_datasets(config, base_dir)
    else:
        reader = _READERS[config.load_dataset_config.data_name]
        rows = []
        for part in _parts(config):
            if part.split not in found:
                raise _unknown_split(config, part.split, found)
            rows.extend(take([row for path in found[part.split] for row in reader(path)], part))
    if not rows:
        raise ConfigError(
            f"split {config.load_dataset_config.split!r} of data config {config.name!r} has no rows",
            where=where(config),
            fix="check `split` and the contents of `data_files`",
        )
    limit = config.load_dataset_config.max_rows
    return rows if limit is None or limit >= len(rows) else mixture.choice(rows, limit, "max_rows")


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
        raise ConfigError(
            f"the mix {config.name!r} has no rows", where=where(config), fix="raise the weights"
        )
    return mixed


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
    if load.data_name in _READERS:
        return base_dir / load.data_dir if load.data_dir is not None else None
    path = base_dir / load.data_name
    return path if path.is_dir() else None


def files(config: DataConfig, base_dir: Path) -> dict[str, tuple[Path, ...]] | None:
    """The local files of each split that ``read`` reads itself; None when ``datasets`` has to load it.

    Raises:
        ConfigError: a named file does not exist, or a file loader names no file.
    """
    load = config.load_dataset_config
    if load.data_name not in _READERS:
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


def _parts(config: DataConfig) -> tuple[Slice, ...]:
    parts = parse_split(config.load_dataset_config.split)
    if parts is None:
        raise ConfigError(
            f"split {config.load_dataset_config.split!r} cannot be read",
            where=where(config),
            fix="write a name, a slice such as train[:10%] or train[100:200], or several joined by +",
        )
    return parts


def _unknown_split(config: DataConfig, split: str, known: Iterable[str]) -> ConfigError:
    names = sorted(known)
    return ConfigError(
        f"data config {config.name!r} has no split {split!r}; it has {', '.join(names)}",
        where=where(config),
        fix=f'set "split": "{names[0]}"' if names else "check `data_files`",
    )


def _read_json(path: Path) -> Iterator[Row]:
    text = _text(path)
    if text.lstrip()[:1] == "[":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _malformed(path, getattr(error, "lineno", 1), getattr(error, "msg", str(error))) from error
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise ConfigError(f"{path}: item {index} of the array is not an object")
            yield item
        return
    # Not splitlines(): it also breaks at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _malformed(path, number, getattr(error, "msg", str(error))) from error
        if not isinstance(item, dict):
            raise _malformed(path, number, "not an object")
        yield item


def _read_csv(path: Path) -> Iterator[Row]:
    # The csv module refuses cells over 128 KiB unless told otherwise, process-wide.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                names = ", ".join(reader.fieldnames or ())
                raise _malformed(
                    path, reader.line_num, f"this row does not have the header's columns: {names}"
                )
            yield dict(row)
    except csv.Error as error:
        raise _malformed(path, reader.line_num, str(error)) from error


def _read_text(path: Path) -> Iterator[Row]:
    for line in _text(path).removesuffix("\n").split("\n"):
        yield {"text": line.removesuffix("\r")}


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise EnvironmentFault(
            "reading Parquet needs pyarrow", fix="pip install 'olive-next[cpu]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as source:
            for batch in source.iter_batches():
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise ConfigError(f"{path} is not a readable Parquet file: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            fix="save the file as UTF-8",
        ) from error
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror}") from error


def _malformed(path: Path, line: int, message: str) -> ConfigError:
    return ConfigError(
        message,
        where=f"{path}:{line}",
        fix="JSON data is one array of objects, or one object a line" if path.suffix != ".csv" else None,
    )


_READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "json": _read_json,
    "jsonl": _read_json,
    "csv": _read_csv,
    "text": _read_text,
    "parquet": _read_parquet,
}


def _through_datasets(config: DataConfig, base_dir: Path) -> list[Row]:
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
    builder = load.data_name in _READERS
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
    return [dict(row) for row in dataset]


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
