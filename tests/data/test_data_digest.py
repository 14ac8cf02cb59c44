import json
from pathlib import Path
from typing import Any

import pytest

from olive.config.workflow import DataConfig
from olive.data.digest import data_digest
from olive.errors import ConfigError


def config(pre: dict[str, Any] | None = None, **load: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": "d",
            "load_dataset_config": {"data_name": "json", "split": "train", **load},
            "pre_process_data_config": pre or {},
        }
    )


def test_contents_and_loading_count_and_names_do_not(tmp_path: Path) -> None:
    for name, text in {"a": "1", "b": "2", "same": "1"}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"n": text}]))
    first = data_digest(config(data_files="a.json"), tmp_path)
    assert first == data_digest(config(data_files="same.json"), tmp_path)
    assert first == data_digest(config({"strategy": "pack"}, data_files=[str(tmp_path / "a.json")]), tmp_path)
    others = [
        data_digest(config(data_files="b.json"), tmp_path),
        data_digest(config(data_files="a.json", split="train[:1]"), tmp_path),
        data_digest(config(data_files=["a.json", "b.json"]), tmp_path),
        data_digest(config(data_files=["b.json", "a.json"]), tmp_path),
        data_digest(config(data_files={"train": "a.json", "test": "b.json"}), tmp_path),
        data_digest(config(data_name="text", data_files="a.json"), tmp_path),
    ]
    assert len({first, *others}) == 7
    (tmp_path / "a.json").write_text("[]")
    assert data_digest(config(data_files="a.json"), tmp_path) != first


def test_folders_and_hub_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.json").write_text("{}")
    one = data_digest(config(data_name="folder"), tmp_path)
    (tmp_path / "folder" / "train.json").write_text('{"a": 1}')
    assert data_digest(config(data_name="folder"), tmp_path) != one
    hub = data_digest(config(data_name="some/hub", revision="1" * 40), tmp_path)
    assert hub != data_digest(config(data_name="some/hub", revision="2" * 40), tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        data_digest(config(data_files="none.json"), tmp_path)
