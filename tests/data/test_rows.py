import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.config.workflow import DataConfig
from olive.data.rows import columns, files, is_local, read
from olive.errors import ConfigError, EnvironmentFault, UntrustedInput

ROWS = [{"phrase": 'so "long",\nand thanks', "tone": "joy"}, {"phrase": "gone\u2028away", "tone": "sadness"}]


def config(**load: Any) -> DataConfig:
    return DataConfig.model_validate(
        {"name": "d", "load_dataset_config": {"data_name": "json", "split": "train", **load}}
    )


def write(path: Path, text: str) -> str:
    path.write_bytes(text.encode("utf-8"))
    return path.name


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_json_lines_and_json_array_are_the_same(tmp_path: Path) -> None:
    one = write(tmp_path / "a.json", lines(ROWS) + "\n")
    two = write(tmp_path / "b.json", "\ufeff" + json.dumps(ROWS, indent=2))
    assert read(config(data_files=one), tmp_path) == read(config(data_files=two), tmp_path) == ROWS
    assert read(config(data_name="jsonl", data_files=one), tmp_path) == ROWS
    assert columns(ROWS) == ("phrase", "tone")


def test_csv_keeps_cells_as_written(tmp_path: Path) -> None:
    name = write(tmp_path / "a.csv", 'phrase,my tone\n"so ""long"",\nand",joy\n007,\nline\u2028sep,x\n')
    rows = read(config(data_name="csv", data_files=name), tmp_path)
    assert rows == [
        {"phrase": 'so "long",\nand', "my tone": "joy"},
        {"phrase": "007", "my tone": ""},
        {"phrase": "line\u2028sep", "my tone": "x"},
    ]


def test_parquet_and_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(config(data_name="parquet", data_files="a.parquet"), tmp_path) == ROWS
    write(tmp_path / "a.txt", "one\r\n\ntwo\n")
    assert [row["text"] for row in read(config(data_name="text", data_files="a.txt"), tmp_path)] == [
        "one",
        "",
        "two",
    ]
    write(tmp_path / "bad.parquet", "not parquet")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        read(config(data_name="parquet", data_files="bad.parquet"), tmp_path)


json_value = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.lists(st.text(), max_size=2))


@given(
    st.lists(st.dictionaries(st.text(max_size=4), json_value, max_size=3), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_json_row_is_read_back(
    tmp_path_factory: Any, rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    (folder / "a.json").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert read(config(data_files="a.json"), folder) == rows


def test_splits_slices_and_several_files(tmp_path: Path) -> None:
    write(tmp_path / "a.json", lines([{"n": n} for n in range(10)]))
    write(tmp_path / "b.json", lines([{"n": n} for n in range(10, 12)]))
    both = read(config(data_files=["a.json", "b.json"]), tmp_path)
    assert [row["n"] for row in both] == list(range(12))
    assert read(config(data_files="*.json"), tmp_path) == both
    named = {"train": "a.json", "test": "b.json"}
    assert [r["n"] for r in read(config(data_files=named, split="test"), tmp_path)] == [10, 11]
    assert [r["n"] for r in read(config(data_files=named, split="train[:20%]+test"), tmp_path)] == [
        0,
        1,
        10,
        11,
    ]


def test_data_dir_is_where_the_files_are(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.json", lines(ROWS))
    assert read(config(data_dir="sub", data_files="a.json"), tmp_path) == ROWS


def test_a_missing_file_says_where_it_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "near.json", "{}")
    with pytest.raises(ConfigError) as caught:
        read(config(data_files="nier.json"), tmp_path)
    assert str(tmp_path / "nier.json") in str(caught.value)
    assert "near.json" in str(caught.value)


def test_an_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "a.json", lines(ROWS))
    with pytest.raises(ConfigError, match=r"no split 'validation'; it has train"):
        read(config(data_files="a.json", split="validation"), tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(config(data_files="a.json", split="train["), tmp_path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1}\n{"a": \n', "a.json:2"),
        ('[{"a": 1},\n {"a" 2}]', "a.json:2"),
        ('{"a": 1}\n[2]\n', "a.json:2"),
        ("[1]", "item 0"),
        ('{"a": ' + "[" * 100_000, "a.json:1"),
        ('{"a": ' + "9" * 5000 + "}", "a.json:1"),
    ],
)
def test_malformed_json_names_the_line(tmp_path: Path, text: str, place: str) -> None:
    write(tmp_path / "a.json", text)
    with pytest.raises(ConfigError, match=place):
        read(config(data_files="a.json"), tmp_path)


def test_malformed_csv_names_the_line(tmp_path: Path) -> None:
    for text in ("a,b\n1,2\n3\n", "a,b\n1,2\n3,4,5\n"):
        write(tmp_path / "a.csv", text)
        with pytest.raises(ConfigError, match=r"a\.csv:3.*columns: a, b"):
            read(config(data_name="csv", data_files="a.csv"), tmp_path)


def test_not_utf8_and_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(ConfigError, match="not UTF-8: byte 7 is 0xe9"):
        read(config(data_files="a.json"), tmp_path)
    (tmp_path / "a.json").write_bytes(b"\n")
    with pytest.raises(ConfigError, match="has no rows"):
        read(config(data_files="a.json"), tmp_path)


def test_a_file_loader_without_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no file"):
        read(config(), tmp_path)


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        read(config(data_files="sub"), tmp_path)


def test_what_is_local(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert files(config(data_name="some/hub", data_files=None), tmp_path) is None
    assert not is_local(config(data_name="some/hub"), tmp_path)
    assert is_local(config(data_name="folder"), tmp_path)
    assert not is_local(config(data_files="https://example.org/a.json"), tmp_path)


def test_a_local_folder_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", lines(ROWS))
    write(folder / "test.jsonl", lines(ROWS[:1]))
    assert read(config(data_name="folder"), tmp_path) == ROWS
    assert read(config(data_name="folder", split="test"), tmp_path) == ROWS[:1]
    with pytest.raises(ConfigError, match="validation"):
        read(config(data_name="folder", split="validation"), tmp_path)


def test_a_dataset_that_brings_code_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "folder.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((UntrustedInput, ConfigError)) as caught:
        read(config(data_name="folder"), tmp_path)
    assert not (tmp_path / "ran").exists()
    assert caught.type is UntrustedInput


def test_a_hub_name_out_of_reach_is_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EnvironmentFault, match="could not be fetched"):
        read(config(data_name="some/hub"), tmp_path)
