"""What identifies the rows of a data config: file contents and how they are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from olive.config.workflow import DataConfig
from olive.data.rows import files, folder, members
from olive.resources.digest import file_digest, folder_digest


def data_digest(config: DataConfig, base_dir: Path, memo: Path | None = None) -> str:
    """SHA-256 over the contents of the config's local files and its load parameters.

    Names and places of files take no part, so that moving them changes nothing; their order does. A hub
    dataset is known by its name and revision alone. The pre-processing takes no part, but for that of the
    parts of a mix, whose own it is not.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.
        memo: stat cache of file digests.

    Raises:
        ConfigError: a named file does not exist.
    """
    if config.mix:
        mixed = [
            [
                part.weight,
                data_digest(member, base_dir, memo),
                member.pre_process_data_config.model_dump(mode="json"),
            ]
            for member, part in zip(members(config), config.mix, strict=True)
        ]
        return _digest({"mix": mixed})
    load = config.load_dataset_config
    found = files(config, base_dir)
    root = folder(config, base_dir)
    parts: dict[str, object] = {"split": load.split, "subset": load.subset}
    if found is not None:
        parts["loader"] = load.data_name
        parts["files"] = {
            split: [file_digest(path, memo=memo) for path in paths] for split, paths in found.items()
        }
    elif root is not None and root.is_dir():
        parts["loader"] = load.data_name if load.data_dir is not None else "folder"
        parts["folder"] = folder_digest(root, memo=memo)
        parts["data_files"] = load.data_files
    else:
        parts["loader"] = load.data_name
        parts["revision"] = load.revision
        parts["data_dir"] = load.data_dir
        parts["data_files"] = load.data_files
    if load.max_rows is not None:
        parts["max_rows"] = load.max_rows
    return _digest(parts)


def _digest(parts: dict[str, object]) -> str:
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
