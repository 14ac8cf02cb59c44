"""Preference rows: told from others, read in every spelling, and what is left out or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olive.config.workflow import DataConfig, PreProcess
from olive.data import formats, preference
from olive.data.chat import ChatTemplate
from olive.data.plan import preview
from olive.data.split import split_rows
from olive.data.template import render as render_one
from olive.data.tokens import IGNORE, load
from olive.errors import ConfigError
from tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = ChatTemplate(TEMPLATE)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SPELLINGS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    "turns": {"prompt": [user("Hi")], "chosen": [bot("Hello")], "rejected": [bot("No")]},
    "whole conversations": {"chosen": [user("Hi"), bot("Hello")], "rejected": [user("Hi"), bot("No")]},
    "both": {"prompt": "Hi", "chosen": [user("Hi"), bot("Hello")], "rejected": [user("Hi"), bot("No")]},
    "prompt repeated": {
        "prompt": [user("Hi")],
        "chosen": [user("Hi"), bot("Hello")],
        "rejected": [user("Hi"), bot("No")],
    },
    "a text and turns": {"prompt": "Hi", "chosen": [bot("Hello")], "rejected": "No"},
}


def resolved(row: dict[str, Any], **given: Any) -> PreProcess:
    return formats.resolve(PreProcess.model_validate(given), [row])


@pytest.mark.parametrize("name", SPELLINGS)
def test_each_spelling_is_found_and_gives_the_same_pair(name: str) -> None:
    row = SPELLINGS[name]
    pre = resolved(row)
    assert pre.format == "preference"
    chosen, rejected = preference.render(pre, row, CHAT)
    assert (chosen.prompt, chosen.completion) == ("<|user|>\nHi<|end|>\n<|assistant|>\n", "Hello<|end|>\n")
    assert (rejected.prompt, rejected.completion) == ("<|user|>\nHi<|end|>\n<|assistant|>\n", "No<|end|>\n")
    assert render_one(pre, row, CHAT).full == chosen.full  # other passes learn the chosen answer


def test_texts_stay_as_they_are_where_there_is_no_chat_template() -> None:
    row = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}
    chosen, rejected = preference.render(resolved(row), row)
    assert (chosen.prompt, chosen.completion, rejected.completion) == ("2 + 2 =", " 4", " 5")
    plain = preference.render(resolved(SPELLINGS["turns"]), SPELLINGS["turns"])[0]
    assert plain.full == "### User:\nHi\n\n### Assistant:\nHello\n\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"chosen": [bot("a")], "rejected": [bot("b")]}, "has no prompt"),
        ({"chosen": [user("x"), bot("a")], "rejected": [user("y"), bot("b")]}, "no turn in common"),
        ({"prompt": "z", "chosen": [user("x"), bot("a")], "rejected": [user("x"), bot("b")]}, "no turn of"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "'chosen' is null"),
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, "holds int"),
        ({"prompt": [user("x")], "chosen": [user("x")], "rejected": [user("x"), bot("b")]}, "has no answer"),
    ],
)  # fmt: skip
def test_rows_that_are_no_preference_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        formats.sides(row)


def test_data_that_may_be_two_forms_is_asked_about() -> None:
    row = {**SPELLINGS["both"], "messages": [user("Hi"), bot("Hello")]}
    with pytest.raises(ConfigError, match="messages or preference"):
        resolved(row, format="auto")


def pairs(tmp_path: Path, rows: list[dict[str, Any]], **given: Any) -> Any:
    return preference.build(rows, PreProcess.model_validate(given), load(tiny_tokenizer(tmp_path / "t")))


def test_a_pair_is_a_block_of_two_documents_with_labels_on_the_answers(tmp_path: Path) -> None:
    tokenizer = load(tiny_tokenizer(tmp_path, chat_template=TEMPLATE))
    row = {
        "chosen": [user("Hi"), bot("yes"), user("more"), bot("quickly"), user("so"), bot("joy")],
        "rejected": [user("Hi"), bot("yes"), user("more"), bot("fear")],
    }
    (block,) = preference.build([row], PreProcess(), tokenizer)
    chosen, rejected = preference.sides(block)
    assert block.lengths == (len(chosen.ids), len(rejected.ids))
    assert tokenizer.decode(chosen.ids) == render_one(resolved(row), row, CHAT).full
    learnt = [tokenizer.decode([n for n in side.labels if n != IGNORE]) for side in (chosen, rejected)]
    # the answers after the common turns, each with the token that ends it
    assert learnt == ["quickly<|end|>joy<|end|>", "fear<|end|>"]


def test_what_teaches_nothing_is_left_out_and_told(tmp_path: Path) -> None:
    good = {"prompt": "Text: rain\n", "chosen": "joy", "rejected": "fear"}
    same = {**good, "rejected": "joy"}
    full = {**good, "prompt": "rain " * 40}
    long = {**good, "chosen": "joy " * 40}
    built = pairs(tmp_path, [good, same, full, long], max_seq_len=32)
    assert (len(built), built.rows) == (2, 4)
    said = [note.message for note in built.notes]
    assert [text.partition(" ")[0] for text in said] == ["1", "1", "1"]
    assert "prompt alone fills" in said[0]
    assert "is the rejected one" in said[1]
    assert "are cut to max_seq_len 32" in said[2]
    assert max(length for block in built for length in block.lengths) == 32


@pytest.mark.parametrize(
    ("row", "given", "said"),
    [
        ({"prompt": "p\n", "chosen": "joy", "rejected": "joy"}, {}, "chosen answer of each is the rejected"),
        ({"prompt": "p " * 60, "chosen": "joy", "rejected": "no"}, {"max_seq_len": 8}, "prompt of 3 alone"),
        ({"prompt": "p\n", "completion": "joy"}, {}, "read by format prompt-completion"),
        ({"text": "p"}, {}, "a template of the document's own"),
        ({"prompt": "p", "chosen": "a"}, {"format": "preference"}, "needs column 'rejected'"),
        ({"prompt": "p\n", "chosen": "a", "rejected": "b"}, {"train_on": "all"}, "train_on is all"),
    ],
)
def test_a_plan_refuses_what_teaches_nothing(
    tmp_path: Path, row: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        preview(_config(tmp_path, [row] * 3, **given), tmp_path, tiny_tokenizer(tmp_path / "t"), pairs=True)


def _config(folder: Path, rows: list[dict[str, Any]], **given: Any) -> DataConfig:
    (folder / "rows.json").write_text(json.dumps(rows))
    load_config = {"data_name": "json", "data_files": str(folder / "rows.json"), "split": "train"}
    return DataConfig.model_validate(
        {"name": "train", "load_dataset_config": load_config, "pre_process_data_config": given}
    )


def test_a_plan_shows_the_pair_and_counts_what_a_run_builds(tmp_path: Path) -> None:
    from olive.report.console import _preview

    folder = tiny_tokenizer(tmp_path / "t", chat_template=TEMPLATE)
    rows = [{"prompt": f"read {n}", "chosen": "yes", "rejected": "nobody told me"} for n in range(10)]
    shown = preview(_config(tmp_path, rows), tmp_path, folder, pairs=True, eval_size=3)
    assert (shown.blocks, shown.eval_blocks, shown.parts[0].train_on) == (7, 3, "pair")
    assert (shown.completion, shown.rejected) == ("yes<|end|>\n", "nobody told me<|end|>\n")
    train, _ = split_rows(rows, 3, 0, PreProcess())
    built = preference.build(train, PreProcess(), load(folder))
    assert (shown.tokens, shown.trained_tokens) == (built.tokens, built.trained_tokens)
    lines = "\n".join(_preview(shown))
    assert "preference, found in the data" in lines
    assert "in 7 pairs of up to" in lines
    assert "rejected  'nobody told me" in lines


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=6, max_size=30), st.integers(0, 5))
def test_answers_to_one_prompt_stay_on_one_side(prompts: list[int], seed: int) -> None:
    if len(set(prompts)) < 2:
        return
    rows = [{"prompt": f"p{p}", "chosen": f"a{n}", "rejected": "b"} for n, p in enumerate(prompts)]
    train, held_out = split_rows(rows, 0.3, seed, PreProcess())
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len(train) + len(held_out) == len(rows)
