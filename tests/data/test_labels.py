"""The assistant's turns, on templates of every habit: what is learnt is each answer and what ends it."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from olive.config.workflow import PreProcess
from olive.data.chat import ChatTemplate
from olive.data.template import render
from olive.data.tokens import IGNORE, LightTokenizer, load
from olive.errors import ConfigError
from tiny import tiny_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples/phi3-tone/model-cache/microsoft/phi-3-mini"
BODY = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "plain": BODY + PROMPT,
    "trims": BODY.replace("m.content", "m.content | trim") + PROMPT,
    "default system": "{% if messages and messages[0].role != 'system' %}<|user|>\nBe good<|end|>\n"
    "{% endif %}" + BODY + PROMPT,
    "eos at the end": BODY + "{% if add_generation_prompt %}<|assistant|>\n{% else %}<pad>{% endif %}",
    "no generation prompt": BODY,
    "thinks": "{% set last = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    + BODY.replace(
        "\n{{",
        "\n{% if m.role == 'assistant' and loop.index0 > last.user %}<think></think>{% endif %}{{",
    )
    + PROMPT,
    "marked": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}" + PROMPT,
    "marked without the end": "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}"
    "<|end|>\n{% endfor %}",
}
PRE = PreProcess(format="messages")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> LightTokenizer:
    return load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def learnt(tokenizer: LightTokenizer, chat: ChatTemplate | None, turns: list[dict[str, Any]]) -> list[str]:
    """The texts of the runs of labelled tokens, after checking that the ids are those of the whole."""
    text = render(PRE, {"messages": turns}, chat)
    encoded = tokenizer.encode_row(text, PRE)
    whole = tokenizer.encode(text.full)
    assert encoded.ids[: len(whole)] == whole
    runs: list[list[int]] = [[]]
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (IGNORE, token)
        if label == token:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


words = st.text(st.sampled_from("abjoy thenrs\nT:é🙂#<|"), max_size=16)
talks = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "tool"]), words).map(
        lambda pair: {"role": pair[0], "content": pair[1]}
    ),
    max_size=5,
).map(lambda turns: [{"role": "user", "content": "Hi"}, *turns])


@pytest.mark.parametrize("name", TEMPLATES)
@given(turns=talks)
@settings(max_examples=60, deadline=None)
def test_what_is_learnt_is_each_answer_and_its_end(
    tokenizer: LightTokenizer, name: str, turns: list[dict[str, Any]]
) -> None:
    stripped = name in (
        "trims",
        "marked without the end",
    )  # the latter's marks cut spaces in the template only
    question = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
    if name == "thinks":  # two answers in a row are not rendered alike before and after the next question
        assume(all(a["role"] == "user" for a, b in pairwise(turns) if b["role"] == "assistant"))
    thought = {index for index in range(question, len(turns)) if name == "thinks"}
    answers = [
        "<think></think>" * (index in thought) + turn["content"]
        for index, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    found = learnt(tokenizer, ChatTemplate(TEMPLATES[name]), turns)
    assert len(found) == len(answers)
    for words_learnt, answer in zip(found, answers, strict=True):
        # Spaces at the start may have joined the header's line end to one token, which generation writes.
        assert words_learnt.removesuffix("<|end|>") in (answer, answer.strip(), answer.lstrip())
        assert words_learnt.endswith("<|end|>")
        if not stripped and not answer[:1].isspace():
            assert words_learnt == answer + "<|end|>"


@given(turns=talks)
@settings(max_examples=60, deadline=None)
def test_a_model_without_a_template_ends_with_eos(
    tokenizer: LightTokenizer, turns: list[dict[str, Any]]
) -> None:
    found = learnt(tokenizer, None, turns)
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert len(found) == len(answers)
    last = turns[-1]["role"] == "assistant"
    for index, text in enumerate(found):
        ended = text.endswith("<|end|>")
        assert ended == (last and index == len(found) - 1)
        assert text.removesuffix("<|end|>").strip() == answers[index].strip()


def test_a_trailing_question_is_kept_and_not_learnt(tokenizer: LightTokenizer) -> None:
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    chat = ChatTemplate(TEMPLATES["plain"])
    assert learnt(tokenizer, chat, turns) == ["two<|end|>"]
    encoded = tokenizer.encode_row(render(PRE, {"messages": turns}, chat), PRE)
    assert tokenizer.decode(encoded.ids) == chat.render(turns)  # and no EOS behind it
    assert learnt(tokenizer, chat, turns[:2]) == []


UNSTABLE = {
    "counts the turns": "{{ messages | length }}" + BODY + PROMPT,
    "drops earlier answers": "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}" + PROMPT,
    "says it twice": BODY.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}") + PROMPT,
    "another prompt": BODY + "{% if add_generation_prompt %}<|answer|>\n{% endif %}",
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_a_template_that_is_not_prefix_stable_is_refused(name: str) -> None:
    turns = [{"role": role, "content": "x y"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ConfigError, match="cannot be told from the chat template") as caught:
        render(PRE, {"messages": turns}, ChatTemplate(UNSTABLE[name]))
    assert "generation" in str(caught.value.problems[0].fix)
    every = PreProcess(format="messages", train_on="all")
    assert render(every, {"messages": turns}, ChatTemplate(UNSTABLE[name])).spans is None


def test_a_prompt_that_ends_inside_a_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tiny_tokenizer(tmp_path)
    joined = Tokenizer(models.BPE())
    joined.decoder = decoders.ByteLevel()
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    joined.train_from_iterator(["a yes, a yes, a yes, a yes"], trainer)
    joined.save(str(folder / "tokenizer.json"))
    tokenizer = load(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    spaced = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
                          "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    with pytest.raises(ConfigError, match="to one token"):
        tokenizer.encode_row(render(PRE, {"messages": turns}, spaced), PRE)
    lines = ChatTemplate(spaced.source.replace(": ", ":\n"))
    assert learnt(tokenizer, lines, turns) == ["yes<|end|>"]


def test_offsets_that_leave_spaces_out_do_not_matter(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = tiny_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.save(str(folder / "tokenizer.json"))
    turns = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "the rain  "}]
    found = learnt(load(folder), ChatTemplate(TEMPLATES["plain"]), turns)
    assert found == ["the rain  <|end|>"]


def test_an_answer_that_is_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    with pytest.raises(ConfigError, match="not text"):
        render(PRE, {"messages": [call]}, ChatTemplate(TEMPLATES["plain"]))
    marked = ChatTemplate(TEMPLATES["marked"])
    assert render(PRE, {"messages": [call]}, marked).spans


PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example's base model is not there: make base")
@given(turns=talks)
@settings(max_examples=100, deadline=None)
def test_on_the_model_of_the_example(turns: list[dict[str, Any]]) -> None:
    tokenizer = example()
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    found = learnt(tokenizer, tokenizer.chat, turns)
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        assert text.endswith("<|im_end|>")
        assert text.removesuffix("<|im_end|>").lstrip() == answer.lstrip()
        if not answer[:1].isspace():
            assert text == answer + "<|im_end|>"


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example's base model is not there: make base")
def test_phi3s_own_template_ends_a_conversation_otherwise_than_a_turn() -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("user", "assistant") * 2]
    text = render(PRE, {"messages": turns}, ChatTemplate(PHI3, {"eos_token": "<|endoftext|>"}))
    spans = text.spans or ()
    assert [text.full[s.start : s.words] for s in spans] == ["assistant says"] * 2
    assert [text.full[s.words : s.stop] for s in spans] == ["<|end|>\n<|", "<|end|>\n<|endoftext|>"]


_example: list[LightTokenizer] = []


def example() -> LightTokenizer:
    if not _example:
        _example.append(load(EXAMPLE))
    return _example[0]


def test_marks_give_the_mask_that_transformers_gives(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tiny_tokenizer(tmp_path, chat_template=TEMPLATES["marked"])
    turns = [{"role": role, "content": f"the rain {n}"} for n, role in enumerate(("user", "assistant") * 2)]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = load(folder)
    encoded = tokenizer.encode_row(render(PRE, {"messages": turns}, tokenizer.chat), PRE)
    assert encoded.ids == theirs["input_ids"]
    assert [int(label != IGNORE) for label in encoded.labels] == theirs["assistant_masks"]
    plain = ChatTemplate(TEMPLATES["plain"])
    assert tokenizer.encode_row(render(PRE, {"messages": turns}, plain), PRE) == encoded
