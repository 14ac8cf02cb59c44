"""When data is read as a stream, and what a plan says of it without reading all."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.config.workflow import DataConfig, link
from olive.data import blocks, rows, stream
from olive.data.digest import data_digest
from olive.data.plan import preview
from olive.data.size import IN_MEMORY, SHARE, sample, size_on_disk, streams
from olive.data.tokens import load
from olive.errors import ConfigError, Severity
from tiny import tiny_tokenizer

ROWS = [{"phrase": f"phrase number {n} {'and more ' * (n % 7)}", "tone": "joy"} for n in range(9000)]


def config(load_settings: dict[str, Any] | None = None, name: str = "d", **pre: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": name,
            "load_dataset_config": {"data_name": "json", "split": "train", "data_files": "a.jsonl"}
            | (load_settings or {}),
            "pre_process_data_config": {"text_template": "{phrase}\n{tone}", "strategy": "pack", **pre},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    made = tiny_tokenizer(tmp_path_factory.mktemp("data"))
    (made / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (made / "array.json").write_text(json.dumps(ROWS[:50]))
    (made / "a.csv").write_text("phrase,tone\n" + "".join(f"{row['phrase']},joy\n" for row in ROWS))
    return made


def test_large_data_streams_and_small_does_not(folder: Path) -> None:
    size = (folder / "a.jsonl").stat().st_size
    assert size_on_disk(config(), folder) == size
    full = int(size * IN_MEMORY / SHARE)
    assert streams(config(), folder, full - 10)
    assert not streams(config(), folder, full + 10)
    assert streams(config({"streaming": True}), folder, full + 10)
    assert not streams(config({"streaming": False}), folder, full - 10)
    assert not streams(config({"data_name": "some/hub", "data_files": None}), folder, 1)
    assert streams(config({"data_name": "some/hub", "data_files": None, "streaming": True}), folder, 1)


def test_how_rows_are_read_is_no_part_of_what_they_are(folder: Path) -> None:
    assert data_digest(config({"streaming": True}), folder) == data_digest(config(), folder)


def test_a_mix_counts_its_parts(folder: Path) -> None:
    one, two = config(name="one"), config({"data_files": "a.csv", "data_name": "csv"}, name="two")
    parts = [{"name": "one", "weight": 3}, {"name": "two", "weight": 0.5}]
    mix = DataConfig.model_validate({"name": "mix", "mix": parts})
    link([one, two, mix])
    sizes = [(folder / name).stat().st_size for name in ("a.jsonl", "a.csv")]
    assert size_on_disk(mix, folder) == 3 * sizes[0] + sizes[1]
    found = sample(mix, folder, 1000)
    assert len(found.rows) == 3500
    assert found.total == pytest.approx(3.5 * len(ROWS), rel=0.05)


def test_a_json_array_cannot_be_read_as_a_stream(folder: Path) -> None:
    array = {"data_files": "array.json"}
    assert not streams(config(array), folder, 1)
    with pytest.raises(ConfigError, match="one JSON array"):
        preview(config(array | {"streaming": True}), folder, folder, memory=1 << 40)


def test_pairs_of_answers_are_held_in_memory(folder: Path) -> None:
    assert not streams(config(), folder, 1, pairs=True)
    with pytest.raises(ConfigError, match="pairs of answers are held in memory"):
        preview(config({"streaming": True}), folder, folder, memory=1 << 40, pairs=True)


@pytest.mark.parametrize(
    ("load_settings", "total"),
    [
        ({}, 9000),
        ({"data_files": "a.csv", "data_name": "csv"}, 9000),
        ({"data_files": ["a.jsonl", "a.jsonl"]}, 18000),
        ({"split": "train[:50%]"}, 4500),
        ({"split": "train[:700]"}, 700),
        ({"split": "train[-700:]"}, 700),
        ({"max_rows": 300}, 300),
    ],
)
def test_the_number_of_rows_is_about_right(folder: Path, load_settings: dict[str, Any], total: int) -> None:
    wanted = config(load_settings)
    assert len(rows.read(wanted, folder)) == total
    found = sample(wanted, folder, 1000)
    assert found.total == pytest.approx(total, rel=0.05)
    assert len(found.rows) == min(1000, total)
    assert set(found.rows[0]) == {"phrase", "tone"}


def test_rows_of_parquet_are_counted(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    found = sample(config({"data_name": "parquet", "data_files": "a.parquet"}), tmp_path, 10)
    assert (len(found.rows), found.total) == (10, 9000)


def test_the_plan_looks_at_the_head_and_says_so(folder: Path, tmp_path: Path) -> None:
    text = (folder / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(text + "this line is no JSON\n")
    wanted = config({"streaming": True}, max_seq_len=128)
    found = preview(wanted, tmp_path, folder, memory=1 << 40, eval_size=0.1, seed=0)
    exact = preview(config(max_seq_len=128), folder, folder, memory=1 << 40, eval_size=0.1, seed=0)
    assert (found.streamed, found.estimated, exact.streamed) == (True, True, False)
    (note,) = [problem for problem in found.problems if "read as a stream" in problem.message]
    assert note.severity is Severity.NOTE
    for name in ("rows", "blocks", "tokens", "trained_tokens", "eval_rows", "eval_blocks"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=0.06), name
    assert (found.prompt, found.completion) == (exact.prompt, exact.completion)
    # what the plan did not look at is told at the run
    with pytest.raises(ConfigError, match=r"a\.jsonl:9001"):
        stream.build(wanted, tmp_path, load(folder), tmp_path / "t", seed=0)


def test_a_stream_takes_little_memory(folder: Path, tmp_path: Path) -> None:
    tokenizer, wanted = load(folder), config(max_seq_len=256)
    size = (folder / "a.jsonl").stat().st_size

    def peak(make: Any) -> float:
        tracemalloc.start()
        try:
            kept = make()
            return tracemalloc.get_traced_memory()[1] / size if kept else 0.0
        finally:
            tracemalloc.stop()

    pre = wanted.pre_process_data_config
    held = peak(lambda: blocks.build(rows.read(wanted, folder), pre, tokenizer, 0))
    streamed = peak(lambda: stream.build(wanted, folder, tokenizer, tmp_path / "t", seed=0))
    # the chunk and the buffer of tokens are most of it here: both do not grow with the data
    assert streamed * size < 20e6
    assert streamed < held / 2
