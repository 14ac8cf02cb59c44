import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.config.workflow import PreProcess
from olive.data.chat import ChatTemplate
from olive.data.template import check, fields, render, render_all
from olive.errors import ConfigError

TONE = "### Text: {phrase}\n### The tone is:\n{tone}"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def pre(**settings: object) -> PreProcess:
    return PreProcess.model_validate(settings)


def test_the_completion_is_the_last_field_and_what_follows() -> None:
    row = {"phrase": "We won {it}!", "tone": "joy"}
    text = render(pre(text_template=TONE), row)
    assert text.prompt == "### Text: We won {it}!\n### The tone is:\n"
    assert (text.completion, text.answer) == ("joy", "joy")
    chat = "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}<|end|>"
    assert render(pre(text_template=chat), row).completion == "joy<|end|>"
    assert render(pre(text_template=chat), row).answer == "joy"


@given(st.text(), st.text(), st.text().map(lambda t: t.replace("{", "{{").replace("}", "}}")))
def test_the_whole_is_what_python_formats(phrase: str, tone: str, literal: str) -> None:
    template = literal + "{phrase} -> {tone}" + literal
    row = {"phrase": phrase, "tone": tone}
    assert render(pre(text_template=template), row).full == template.format(**row)


def test_a_space_before_the_last_field_belongs_to_it() -> None:
    text = render(pre(text_template="Q: {q} A: {a}"), {"q": "1+1", "a": "2"})
    assert (text.prompt, text.completion, text.answer) == ("Q: 1+1 A:", " 2", "2")


def test_columns_with_spaces_dots_and_nesting() -> None:
    row = {"my phrase": "x", "a.b": "y", "nested": {"inner": ["p", "q"]}, "n": 3.14159}
    template = "{my phrase}|{a.b}|{nested[inner][1]}|{n:.2f}|{my phrase!r}"
    assert fields(template) == ["my phrase", "a.b", "nested[inner][1]", "n", "my phrase"]
    assert render(pre(text_template=template), row).full == "x|y|q|3.14|'x'"
    with pytest.raises(ConfigError, match="finds nothing"):
        render(pre(text_template="{nested[no]}"), row)


def test_no_attribute_of_a_value_is_reachable() -> None:
    with pytest.raises(ConfigError, match="no column"):
        render(pre(text_template="{phrase.__class__}"), {"phrase": "x"})


def test_text_cols_are_joined_by_a_space() -> None:
    text = render(pre(text_cols=["phrase", "tone"]), {"phrase": "We won!", "tone": "joy"})
    assert (text.full, text.answer) == ("We won! joy", "joy")
    alone = render(pre(), {"text": "once"})
    assert (alone.prompt, alone.completion) == ("", "once")


def test_a_missing_column_lists_the_columns() -> None:
    problems = check(pre(text_template=TONE), ("phrase", "tonne"))
    assert [problem.message for problem in problems] == [
        "text_template names 'tone', which is no column of the data"
    ]
    assert problems[0].fix == "the data has columns phrase, tonne; did you mean 'tonne'?"
    assert check(pre(text_cols=["a", "b"]), ("a",))[0].message.startswith("text_cols names 'b'")
    assert not check(pre(text_template=TONE), ("phrase", "tone"))
    assert "no field" in check(pre(text_template="same for all"), ("phrase",))[0].message


@pytest.mark.parametrize("template", ["{phrase", "{phrase}}", "{}", "{phrase:>{width}}"])
def test_what_is_no_format_string(template: str) -> None:
    with pytest.raises(ConfigError):
        fields(template)


def test_null_values_are_counted_and_never_rendered() -> None:
    rows = [
        {"phrase": "a", "tone": "joy"},
        {"phrase": "b", "tone": None},
        {"phrase": None, "tone": "x"},
        {"phrase": "c"},
    ]
    with pytest.raises(ConfigError) as caught:
        render_all(pre(text_template=TONE), rows)
    assert "row 1 and 1 more: column 'tone' is null or missing" in str(caught.value)
    assert "row 2: column 'phrase' is null" in str(caught.value)


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_chat_turns() -> None:
    chat = ChatTemplate(CHAT, {"bos_token": "<s>"})
    text = render(pre(chat_template=True), {"messages": TURNS}, chat)
    assert text.prompt == "<s><|user|>\nHi<|end|>\n<|assistant|>\n"
    assert (text.completion, text.answer) == ("Hello<|end|>\n", "Hello")
    own = render(pre(chat_template="{{ messages[0].content }}", message_col="turns"), {"turns": TURNS})
    assert own.full == "Hi"


def test_chat_without_a_completion() -> None:
    chat = ChatTemplate(CHAT, {"bos_token": "<s>"})
    assert render(pre(chat_template=True), {"messages": TURNS[:1]}, chat).prompt == ""
    with pytest.raises(ConfigError, match="no completion"):
        render(pre(chat_template=True, train_on="completion"), {"messages": TURNS[:1]}, chat)


def test_chat_faults() -> None:
    with pytest.raises(ConfigError, match="has none"):
        render(pre(chat_template=True), {"messages": TURNS})
    with pytest.raises(ConfigError, match="list of chat turns"):
        render(pre(chat_template=CHAT), {"messages": "Hi"})
    with pytest.raises(ConfigError, match="'messages', which is no column"):
        render(pre(chat_template=CHAT), {"turns": TURNS})


def test_a_chat_template_is_sandboxed_and_may_refuse() -> None:
    with pytest.raises(ConfigError, match="may not"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}").render(TURNS)
    with pytest.raises(ConfigError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(TURNS)
    with pytest.raises(ConfigError, match="does not render"):
        ChatTemplate("{% if %}").render(TURNS)


def test_chat_renders_as_transformers_does() -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    source = CHAT + "{{ messages | tojson }}{% for n in [1, 2] %}{% break %}{% endfor %}"
    expected, _ = utilities.render_jinja_template([TURNS], chat_template=source, bos_token="<s>")
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(TURNS) == expected[0]
