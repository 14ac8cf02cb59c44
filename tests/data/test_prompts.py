from pathlib import Path

import pytest

from olive.config.workflow import PreProcess
from olive.data.prompts import prompts
from olive.data.tokens import IGNORE, LightTokenizer, load
from tiny import tiny_tokenizer

ROWS = [{"phrase": f"phrase {n}", "tone": "joy" if n % 2 else "fear"} for n in range(10)]
TONE = PreProcess(text_template="### Text: {phrase}\n### The tone is:\n{tone}<|end|>", train_on="completion")


@pytest.fixture
def tokenizer(tmp_path: Path) -> LightTokenizer:
    return load(tiny_tokenizer(tmp_path))


def test_prompts_are_the_masked_part_of_training(tokenizer: LightTokenizer) -> None:
    from olive.data.template import render

    found, answers = prompts(ROWS, TONE, tokenizer)
    assert answers == [row["tone"] for row in ROWS]
    for row, prompt in zip(ROWS, found, strict=True):
        encoded = tokenizer.encode_row(render(TONE, row), TONE)
        assert prompt == encoded.ids[: encoded.labels.count(IGNORE)]


def test_some_are_spread_over_the_rows(tokenizer: LightTokenizer) -> None:
    found, answers = prompts(ROWS, TONE, tokenizer, 5)
    assert answers == ["fear"] * 5
    assert found == prompts(ROWS, TONE, tokenizer)[0][::2]
    assert len(prompts(ROWS, TONE, tokenizer, 99)[0]) == 10


def test_a_single_column_prompts_with_its_first_half(tokenizer: LightTokenizer) -> None:
    found, answers = prompts([{"text": "nobody told me the family"}], PreProcess(), tokenizer)
    ids = tokenizer.encode("nobody told me the family")
    assert found == [ids[: (len(ids) + 1) // 2]]
    assert answers == ["nobody told me the family"]
