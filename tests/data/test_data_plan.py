import json
from pathlib import Path
from typing import Any

import pytest

from olive.config.workflow import DataConfig
from olive.data import plan
from olive.data.blocks import build, build_held_out
from olive.data.plan import preview
from olive.data.split import split_rows
from olive.data.tokens import load
from olive.errors import ConfigError, Severity
from olive.report import console
from tiny import tiny_tokenizer

TONE = "### Text: {phrase}\n### The tone is:\n{tone}"
ROWS = [{"phrase": f"phrase number {n}", "tone": "joy" if n % 2 else "fear"} for n in range(40)]


def config(load_settings: dict[str, Any] | None = None, **pre: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": "tones",
            "load_dataset_config": {
                "data_name": "json",
                "split": "train",
                "data_files": "a.json",
                **(load_settings or {}),
            },
            "pre_process_data_config": {"text_template": TONE, "max_seq_len": 128, **pre},
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    return tiny_tokenizer(tmp_path)


@pytest.mark.parametrize("strategy", ["join", "pack", "line-by-line"])
def test_the_counts_are_those_of_training(folder: Path, strategy: str) -> None:
    wanted = config(strategy=strategy, train_on="completion")
    found = preview(wanted, folder, folder, eval_size=0.3, seed=5)
    train, held = split_rows(ROWS, 0.3, 5)
    blocks = build(train, wanted.pre_process_data_config, load(folder))
    assert (found.rows, found.columns, found.eval_rows) == (40, ("phrase", "tone"), 12)
    assert (found.blocks, found.tokens, found.trained_tokens) == (
        len(blocks),
        blocks.tokens,
        blocks.trained_tokens,
    )
    assert found.eval_blocks == len(build_held_out(held, wanted.pre_process_data_config, load(folder)))
    assert not found.estimated
    assert (found.prompt, found.completion) == ("### Text: phrase number 0\n### The tone is:\n", "fear")
    assert len(found.ids) == len(found.labels) > found.labels.count(-100) > 0


def test_without_a_tokenizer_the_rows_are_still_checked(folder: Path) -> None:
    assert preview(config(), folder, None).rows == 40
    with pytest.raises(ConfigError, match="'mood', which is no column"):
        preview(config(text_template="{phrase} {mood}"), folder, None)


def test_every_fault_is_in_the_one_error(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        preview(config(strategy="join-random", text_template="{phrase} {mood} {x}"), folder, folder, seed=1)
    assert len(caught.value.problems) == 3
    assert all(str(problem.where).startswith("data_configs[tones]") for problem in caught.value.problems)


def test_a_corpus_smaller_than_a_block_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="makes no block of 4096 tokens from 40 rows"):
        preview(config(max_seq_len=4096), folder, folder)


def test_a_large_dataset_is_estimated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = preview(config(strategy="pack"), folder, folder)
    monkeypatch.setattr(plan, "_COUNTED", 20)
    found = preview(config(strategy="pack"), folder, folder)
    assert found.estimated
    assert found.tokens == pytest.approx(exact.tokens, rel=0.05)
    capped = preview(config(strategy="pack", max_samples=3), folder, folder)
    assert capped.blocks == 3


def test_a_hub_dataset_is_left_to_the_run(folder: Path) -> None:
    found = preview(config({"data_name": "some/hub", "data_files": None}), folder, folder)
    assert found.rows == 0
    assert [problem.severity for problem in found.problems] == [Severity.NOTE, Severity.WARNING]
    pinned = preview(
        config({"data_name": "some/hub", "data_files": None, "revision": "a" * 40}), folder, folder
    )
    assert [problem.severity for problem in pinned.problems] == [Severity.NOTE]


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chats(folder: Path, rows: list[dict[str, Any]], **pre: Any) -> DataConfig:
    (folder / "chat.json").write_text(json.dumps(rows))
    tiny_tokenizer(folder, chat_template=CHAT)
    load_settings = {"data_name": "json", "split": "train", "data_files": "chat.json"}
    return DataConfig.model_validate(
        {
            "name": "talks",
            "load_dataset_config": load_settings,
            "pre_process_data_config": {"strategy": "pack", **pre},
        }
    )


def test_a_chat_dataset_says_its_form_and_what_is_learnt(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(7)]
    wanted = chats(tmp_path, rows)
    found = preview(wanted, tmp_path, tmp_path)
    part = found.parts[0]
    assert (part.name, part.format, part.detected, part.train_on) == ("talks", "alpaca", True, "assistant")
    assert part.rendering == "the model's chat template"
    assert (found.prompt, found.completion) == ("<|user|>\nsay 0<|end|>\n<|assistant|>\n", "0<|end|>\n")
    tokenizer = load(tmp_path)
    assert tokenizer.decode([label for label in found.labels if label >= 0]) == "0<|end|>"
    assert found.trained_tokens == 7 * 2
    assert "".join(console._preview(found)).count("alpaca, found in the data") == 1
    named = preview(chats(tmp_path, rows, format="alpaca"), tmp_path, tmp_path)
    assert not named.parts[0].detected
    old = preview(chats(tmp_path, rows, text_template="{instruction}{output}"), tmp_path, tmp_path)
    assert (old.parts[0].format, old.parts[0].train_on) == ("", "all")
    assert old.trained_tokens == old.tokens - 7


def test_conversations_are_counted_by_a_part_and_checked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 40
    exact = preview(chats(tmp_path, rows), tmp_path, tmp_path)
    monkeypatch.setattr(plan, "_COUNTED_CHATS", 8)
    found = preview(chats(tmp_path, rows), tmp_path, tmp_path)
    assert found.estimated
    assert (found.tokens, found.trained_tokens) == (exact.tokens, exact.trained_tokens)
    with pytest.raises(ConfigError, match="row 40: column 'messages' is not a list of chat turns"):
        preview(chats(tmp_path, [*rows, {"messages": []}]), tmp_path, tmp_path)


def test_a_run_that_would_learn_nothing_stops_at_plan(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "no answer"}, {"role": "tool", "content": "none"}]
    with pytest.raises(ConfigError, match="no row has an answer to learn") as caught:
        preview(chats(tmp_path, [{"messages": talk}] * 3), tmp_path, tmp_path)
    assert caught.value.exit_code == 2
    assert "train_on" in str(caught.value.problems[0].fix)
    long = [{"role": "user", "content": "word " * 50}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ConfigError, match="begin beyond max_seq_len 16") as caught:
        preview(chats(tmp_path, [{"messages": long}] * 3, max_seq_len=16), tmp_path, tmp_path)
    wanted = int(str(caught.value.problems[0].fix).split("max_seq_len to ")[1].split()[0])
    assert preview(chats(tmp_path, [{"messages": long}], max_seq_len=wanted), tmp_path, tmp_path).blocks == 1
    with pytest.raises(ConfigError):
        preview(chats(tmp_path, [{"messages": long}], max_seq_len=wanted - 1), tmp_path, tmp_path)
