"""Four forms of chat data: found, rendered, refused; and documents that name none stay what they were."""

import json
from pathlib import Path
from typing import Any

import pytest

from olive.config.workflow import PreProcess
from olive.data import formats
from olive.data.chat import ChatTemplate
from olive.data.template import check, render, render_all
from olive.errors import ConfigError

CHAT = ChatTemplate(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}
PROMPT = {"prompt": "Hi", "completion": "Hello"}
ROWS: dict[str, dict[str, Any]] = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "prompt-completion": PROMPT,
}


def pre(**settings: object) -> PreProcess:
    return PreProcess.model_validate(settings)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("wanted", [None, "auto", "named"])
def test_each_form_is_found_and_gives_the_same_turns(name: str, wanted: str | None) -> None:
    given = pre(format=name if wanted == "named" else wanted)
    found = formats.resolve(given, [ROWS[name]])
    assert (found.format, found.train_on) == (name, "assistant")
    text = render(given, ROWS[name], CHAT)
    assert text.full == "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
    assert (text.prompt, text.answer) == ("<|user|>\nHi<|end|>\n<|assistant|>\n", "Hello")
    assert [text.full[span.start : span.words] for span in text.spans or ()] == ["Hello"]


def test_a_model_without_a_template_gets_plain_paragraphs() -> None:
    for name in ("messages", "sharegpt", "alpaca"):
        assert render(pre(), ROWS[name]).full == "### User:\nHi\n\n### Assistant:\nHello\n\n"
    bare = render(pre(), {"prompt": "2 + 2 = ", "completion": "4"})
    assert (bare.prompt, bare.completion, bare.answer) == ("2 + 2 =", " 4", "4")


def test_what_a_row_has_beside_the_turns_is_not_lost() -> None:
    asked = render(pre(), {**ALPACA, "input": "there", "system": "Be brief"}, CHAT).full
    assert asked.startswith("<|system|>\nBe brief<|end|>\n<|user|>\nHi\n\nthere<|end|>")
    assert "Be brief" in render(pre(), {**SHAREGPT, "system": "Be brief"}, CHAT).full
    lists = {"prompt": MESSAGES["messages"][:1], "completion": MESSAGES["messages"][1:]}
    assert render(pre(), lists, CHAT) == render(pre(), MESSAGES, CHAT)


# Every way in which a document of before says what a row's text is, on data that has chat columns as well.
OLD: list[dict[str, Any]] = [
    {"text_template": "{prompt} -> {completion}"},
    {"text_cols": ["prompt", "completion"]},
    {"text_template": "{prompt} -> {completion}", "train_on": "completion"},
    {"chat_template": True},
    {"chat_template": "{{ messages[0].content }}"},
    {"chat_template": True, "train_on": "completion"},
]


@pytest.mark.parametrize("settings", OLD)
def test_a_document_that_names_its_text_is_left_alone(settings: dict[str, Any]) -> None:
    given = pre(**settings)
    row = {**MESSAGES, **PROMPT, **ALPACA}
    assert formats.resolve(given, [row]) is given
    text = render(given, row, CHAT)
    assert text.spans is None
    expected = {
        "text_template": "Hi -> Hello",
        "text_cols": "Hi Hello",
        "chat_template": "Hi" if isinstance(given.chat_template, str) else CHAT.render(row["messages"]),
    }
    assert text.full == expected[next(iter(settings))]


def test_a_column_called_text_is_the_text_as_ever() -> None:
    row = {"text": "once", **MESSAGES, **PROMPT}
    assert formats.resolve(pre(), [row]) == pre()
    assert render(pre(), row, CHAT).full == "once"
    with pytest.raises(ConfigError, match="text_cols names 'text', which is no column"):
        render(pre(), {"phrase": "x"}, CHAT)


def test_data_that_may_be_two_things_is_not_guessed_at() -> None:
    with pytest.raises(ConfigError, match="messages or prompt-completion") as caught:
        formats.resolve(pre(), [{**MESSAGES, **PROMPT}])
    assert caught.value.problems[0].fix == (
        "name one of them as format; the data has columns messages, prompt, completion"
    )
    with pytest.raises(ConfigError, match="none of the forms") as caught:
        formats.resolve(pre(format="auto"), [{"phrase": "x", "tone": "y"}])
    assert "columns phrase, tone" in str(caught.value.problems[0].fix)


def test_a_format_that_does_not_fit_names_the_columns() -> None:
    problems = check(pre(format="alpaca"), ("instruction", "response"))
    assert [problem.message for problem in problems] == [
        "format alpaca needs column 'output', which the data does not have"
    ]
    assert problems[0].fix == "the data has columns instruction, response"
    with pytest.raises(ConfigError, match="train_on is assistant"):
        formats.resolve(pre(text_cols=["a"], train_on="assistant"), [{"a": "x"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "nobody", "value": "x"}]}, "'nobody', which is no role"),
        ({"conversations": "Hi"}, "not a list of ShareGPT turns"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "null or missing"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "holds int, not text"),
    ],
)
def test_faults_of_rows_are_counted(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        render_all(pre(), [SHAREGPT, row, row], CHAT)
    assert caught.value.problems[0].where == "row 1 and 1 more"


def test_the_reader_of_a_document_accepts_each_format(tmp_path: Path) -> None:
    assert pre(**json.loads(json.dumps({"format": "sharegpt", "train_on": "assistant"}))).format == "sharegpt"
    with pytest.raises(ValueError, match="'messages'"):
        pre(format="chatml")
