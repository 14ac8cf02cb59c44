"""Data kept on disk makes the blocks that data in memory makes, to the bit."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.config.workflow import DataConfig, link
from olive.data import blocks, rows, stream
from olive.data.blocks import Blocks
from olive.data.split import split_places
from olive.data.tokens import LightTokenizer, load
from olive.errors import ConfigError, EnvironmentFault
from tiny import tiny_tokenizer

STRATEGIES = ("line-by-line", "line-by-line-random", "join", "join-random", "join-sliding-window", "pack")
WORDS = [
    "the",
    "rain",
    "would",
    "not",
    "stop",
    "and",
    "I",
    "missed",
    "you",
    "all",
    "day",
    "we",
    "won",
    "danced",
    "street",
    "moved",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> LightTokenizer:
    return load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 20)))
        row = {"phrase": text, "tone": draw.choice(["joy", "fear"])}
        # columns that not every row has, and rows that come again
        made.append(row | ({"note": "x"} if draw.random() < 0.3 else {}))
    made += made[: count // 7]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def config(path: Path, name: str = "train", load: dict[str, Any] | None = None, **pre: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": name,
            "load_dataset_config": {"data_name": "json", "data_files": path.name, "split": "train"}
            | (load or {}),
            "pre_process_data_config": {
                "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                "max_seq_len": 48,
            }
            | pre,
        }
    )


def in_memory(
    given: DataConfig, folder: Path, tokenizer: LightTokenizer, seed: int, eval_size: float
) -> tuple[Blocks, Blocks | None]:
    read, pre = rows.read(given, folder), given.pre_process_data_config
    places, others = split_places(read, eval_size, seed, pre)
    held = [read[index] for index in others]
    return (
        blocks.build([read[index] for index in places], pre, tokenizer, seed, places),
        blocks.build_held_out(held, pre, tokenizer, seed, others) if held else None,
    )


def outcome(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except ConfigError as error:
        return error


def same(one: Blocks | None, two: Blocks | None) -> None:
    assert (one is None) == (two is None)
    if one is None or two is None:
        return
    assert list(one.blocks) == list(two.blocks)
    assert (one.rows, one.tokens, one.trained_tokens) == (two.rows, two.tokens, two.trained_tokens)
    assert [note.message for note in one.notes] == [note.message for note in two.notes]
    sizes = getattr(two.blocks, "sizes", [])
    assert list(sizes) == [len(block.ids) for block in one.blocks]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_blocks_on_disk_are_those_in_memory(
    tmp_path_factory: Any, tokenizer: LightTokenizer, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    path = write_rows(folder / "a.jsonl", data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99)))
    limit = data.draw(st.integers(8, 64))
    given_config = config(
        path,
        load={
            "max_rows": data.draw(st.sampled_from([None, 5])),
            "split": data.draw(st.sampled_from(["train", "train[:60%]", "train[1:]", "train[-9:]"])),
        },
        strategy=data.draw(st.sampled_from(STRATEGIES)),
        max_seq_len=limit,
        stride=data.draw(st.integers(1, limit)),
        train_on=data.draw(st.sampled_from(["all", "completion"])),
        max_samples=data.draw(st.sampled_from([None, 7])),
        drop_short_sequences=data.draw(st.booleans()),
    )
    seed, eval_size = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([0, 0.2, 3]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_CHUNK", data.draw(st.integers(1, 9)))
        expected = outcome(lambda: in_memory(given_config, folder, tokenizer, seed, eval_size))
        where = folder / "t"
        found = outcome(
            lambda: stream.build(given_config, folder, tokenizer, where, seed=seed, eval_size=eval_size)
        )
    if isinstance(expected, ConfigError):
        assert isinstance(found, ConfigError)
        assert found.problems == expected.problems
        return
    assert isinstance(found, tuple)
    same(expected[0], found[0])
    same(expected[1], found[1])
    # rows are named by the same numbers
    for one, two in zip(expected[0].blocks, found[0].blocks, strict=True):
        assert [int(name.rpartition(" ")[2]) for name in one.rows] == [
            int(name.rpartition(" ")[2]) for name in two.rows
        ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_chat_data_and_a_mix(tmp_path: Path, tokenizer: LightTokenizer, strategy: str) -> None:
    talk = [
        {
            "messages": [
                {"role": "user", "content": f"say {index}"},
                {"role": "assistant", "content": "yes " * (1 + index % 5)},
            ]
        }
        for index in range(21)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, talk)), encoding="utf-8")
    texts = config(write_rows(tmp_path / "a.jsonl", 30), name="texts", train_on="completion")
    chats = DataConfig.model_validate(
        {
            "name": "chats",
            "load_dataset_config": {"data_name": "json", "data_files": "chat.jsonl", "split": "train"},
        }
    )
    arranged = {"strategy": strategy, "max_seq_len": 40, "stride": 20, "random_seed": 5}
    inner = DataConfig.model_validate(
        {"name": "inner", "mix": [{"name": "chats", "weight": 1.5}], "pre_process_data_config": arranged}
    )
    mix = DataConfig.model_validate(
        {
            "name": "mix",
            "mix": [{"name": "texts", "weight": 0.5}, {"name": "inner", "weight": 2}],
            "pre_process_data_config": arranged,
        }
    )
    link([texts, chats, inner, mix])
    for given_config, eval_size in ((chats, 0.2), (mix, 0), (mix, 0.25)):
        if given_config is chats:
            given_config = chats.model_copy(update={"pre_process_data_config": inner.pre_process_data_config})
        expected = in_memory(given_config, tmp_path, tokenizer, 3, eval_size)
        where = tmp_path / f"{given_config.name}-{eval_size}"
        found = stream.build(given_config, tmp_path, tokenizer, where, seed=3, eval_size=eval_size)
        same(expected[0], found[0])
        same(expected[1], found[1])


@pytest.mark.parametrize("kind", ["csv", "text", "parquet", "folder"])
def test_other_kinds_of_files(
    tmp_path: Path, tokenizer: LightTokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [f"number {index}, and {'more ' * (index % 4)}" for index in range(50)]
    pre = {"strategy": "pack", "max_seq_len": 40}
    load_config: dict[str, Any] = {"data_name": kind, "data_files": f"a.{kind}", "split": "train"}
    if kind == "csv":
        (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{line}"\n' for line in text))
    elif kind == "text":
        (tmp_path / "a.text").write_text("\r\n".join(text))
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": text}), tmp_path / "a.parquet", row_group_size=7)
    else:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
        load_config = {"data_name": "folder", "split": "train"}
    given_config = DataConfig.model_validate(
        {"name": "d", "load_dataset_config": load_config, "pre_process_data_config": pre}
    )
    expected = in_memory(given_config, tmp_path, tokenizer, 0, 0.1)
    found = stream.build(given_config, tmp_path, tokenizer, tmp_path / "t", seed=0, eval_size=0.1)
    same(expected[0], found[0])
    same(expected[1], found[1])


def test_tokens_that_are_there_are_used_again_and_damage_is_found(
    tmp_path: Path, tokenizer: LightTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_config = config(write_rows(tmp_path / "a.jsonl", 30), strategy="pack")

    def build() -> list[Any]:
        made, _ = stream.build(given_config, tmp_path, tokenizer, tmp_path / "t", seed=0)
        return list(made.blocks)

    first = build()
    with monkeypatch.context() as patch:
        patch.setattr(LightTokenizer, "encode_rows", None)  # nothing may be tokenised again
        assert build() == first
    content = bytearray((tmp_path / "t" / "tokens.bin").read_bytes())
    content[40] ^= 1
    (tmp_path / "t" / "tokens.bin").write_bytes(content)
    assert build() == first
    # as a kill leaves it: tokens without an index
    (tmp_path / "t" / "index.json").unlink()
    (tmp_path / "t" / "tokens.bin").write_bytes(content[:100])
    assert build() == first
    write_rows(tmp_path / "a.jsonl", 60)
    with pytest.raises(EnvironmentFault, match="of other data"):
        build()


def test_blocks_are_read_in_other_processes_too(tmp_path: Path, tokenizer: LightTokenizer) -> None:
    given_config = config(write_rows(tmp_path / "a.jsonl", 30), strategy="pack")
    made, _ = stream.build(given_config, tmp_path, tokenizer, tmp_path / "t", seed=0)
    expected = list(made.blocks)
    child = os.fork()
    if not child:
        os._exit(0 if list(made.blocks) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert list(made.blocks) == expected


def test_processes_that_train_together_write_the_tokens_once(
    tmp_path: Path, tokenizer: LightTokenizer
) -> None:
    given_config = config(write_rows(tmp_path / "a.jsonl", 300), strategy="pack")
    reader, writer = os.pipe()
    children = []
    for _ in range(4):
        if not (child := os.fork()):
            encode = tokenizer.encode_rows

            def noted(*given: Any, encode: Any = encode) -> Any:
                os.write(writer, b"x")
                return encode(*given)

            tokenizer.encode_rows = noted  # type: ignore[method-assign]
            made, _ = stream.build(given_config, tmp_path, tokenizer, tmp_path / "t", seed=0)
            os._exit(0 if len(list(made.blocks)) == len(made) else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    os.close(writer)
    with os.fdopen(reader) as file:
        assert len(file.read()) == 2  # chunks of 256 rows
    expected, _ = in_memory(given_config, tmp_path, tokenizer, 0, 0)
    found, _ = stream.build(given_config, tmp_path, tokenizer, tmp_path / "t", seed=0)
    same(expected, found)


def test_a_fault_names_the_row(tmp_path: Path, tokenizer: LightTokenizer) -> None:
    path = write_rows(tmp_path / "a.jsonl", 600)
    with path.open("a") as file:
        file.write('{"phrase": null, "tone": "joy"}\n')
    with pytest.raises(ConfigError, match=r"train row 685.*column 'phrase' is null"):
        stream.build(config(path), tmp_path, tokenizer, tmp_path / "t", seed=0)
    assert not (tmp_path / "t" / "index.json").exists()
