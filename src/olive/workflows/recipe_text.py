"""How the rows of a dataset become text: what the user says, else what the columns are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olive.config.workflow import PreProcess
from olive.data import formats
from olive.data.rows import Row, columns
from olive.data.template import Text, check, fields
from olive.errors import ConfigError, raise_errors

# columns that are no text to learn from, and columns that answer the others, the surest first
_NUMBERING = ("id", "idx", "index", "uid", "uuid", "unnamed: 0", "")
_ANSWERS = ("completion", "response", "output", "answer", "label", "target", "summary", "translation",
            "category", "class", "sentiment", "tone", "emotion", "intent")  # fmt: skip
_QUESTIONS = ("system", "instruction", "context", "document", "article", "passage", "input", "prompt",
              "question", "query", "source", "text", "sentence", "phrase")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """How a row becomes text.

    Attributes:
        settings: for ``pre_process_data_config``.
        reason: why so.
    """

    settings: dict[str, Any]
    reason: str


def text_format(
    rows: Sequence[Row] | None,
    *,
    template: str | None,
    text_cols: Sequence[str],
    chat: bool,
    pairs: bool = False,
) -> Format:
    """How rows become text: what the user says, else what the columns are.

    Args:
        rows: the rows; None when they are not known.
        template: of the user.
        text_cols: of the user.
        chat: whether the model brings a chat template.
        pairs: whether the rows are to be preferences.

    Raises:
        ConfigError: the columns do not tell, or lack what the user names; the message lists them.
    """
    if pairs:
        found = _preferences(chat)
    elif template is not None:
        whole = len(set(fields(template))) < 2
        found = Format({"text_template": template} | ({} if whole else _COMPLETION), "as given")
    elif text_cols:
        found = Format({"text_cols": list(text_cols)}, "as given")
    elif rows is None:
        raise ConfigError(
            "the columns of a hub dataset are not known before it is read",
            where="--data",
            fix="Add --download to read it now, or say how its rows read with --template or --text-cols. "
            "If it is a file or a folder, check its name.",
        )
    else:
        found = _from_columns(rows, chat)
    if rows is not None:
        raise_errors(check(PreProcess.model_validate(found.settings), columns(rows)))
    return found


def _preferences(chat: bool) -> Format:
    return Format(
        {"format": "preference"} | ({"chat_template": True} if chat else {}),
        "the method compares chosen and rejected answers",
    )


_COMPLETION: dict[str, Any] = {"train_on": "completion"}


def _from_columns(rows: Sequence[Row], chat: bool) -> Format:
    kinds = {name: _kind(rows, name) for name in columns(rows)}
    form = _chat_form(rows, kinds, chat)
    if form is not None:
        return form
    named = {name.lower(): name for name, kind in kinds.items() if kind in ("text", "number")}
    answer = next((named[word] for word in _ANSWERS if word in named), None)
    texts = [
        name for name, kind in kinds.items() if kind == "text" and name.strip().lower() not in _NUMBERING
    ]
    if not texts:
        raise _undecided("no column of text was found", kinds)
    others = [name for name in texts if name != answer]
    if answer is None and len(texts) == 1:
        return Format({"text_cols": texts}, f"{texts[0]} is the only column of text")
    if answer is None and "text" in texts:
        return Format({"text_cols": ["text"]}, "the data has a column called text, and none with an answer")
    if answer is None and len(texts) == 2:
        answer, others = texts[1], texts[:1]
        if answer.lower() in _QUESTIONS and others[0].lower() not in _QUESTIONS:
            answer, others = others[0], [answer]
    if answer is None:
        raise _undecided(f"{len(texts)} columns are text, and none is known for an answer", kinds, texts)
    if not others:
        return Format({"text_cols": [answer]}, f"{answer} is the only column of text")
    if len(others) > 1 and not all(name.lower() in _QUESTIONS for name in others):
        raise _undecided(
            f"{answer} is the answer, but to which of the other columns?", kinds, [*others, answer]
        )
    why = f"{answer} answers {' and '.join(others)}; only the answer is learnt"
    return Format({"text_template": _headed([*others, answer])} | _COMPLETION, why)


def _headed(names: Sequence[str]) -> str:
    heads = [name.replace("_", " ").strip().capitalize() for name in names]
    parts = [f"### {head}: {{{name}}}\n" for head, name in zip(heads[:-1], names[:-1], strict=True)]
    return "".join(parts) + f"### {heads[-1]}:\n{{{names[-1]}}}"


def _chat_form(rows: Sequence[Row], kinds: Mapping[str, str], chat: bool) -> Format | None:
    """Chat data in a form that the data room knows; None where there is none or a template does better."""
    turns = [name for name, kind in kinds.items() if kind == "turns"]
    column = "messages" if "messages" in turns or not turns else turns[0]
    try:
        form = formats.resolve(PreProcess(format="auto", message_col=column), rows).format
    except ConfigError:  # none, or several
        form = "messages" if turns else None
    talk = form in ("messages", "sharegpt", "preference")
    if form is None or not (chat or talk):
        return None
    settings: dict[str, Any] = {"format": form} | ({"chat_template": True} if chat else {})
    if form == "messages" and column != "messages":
        settings["message_col"] = column
    if form == "preference":
        return Format(
            _preferences(chat).settings, "the data holds preferences; the chosen answers are learnt"
        )
    what = "the data holds conversations" if talk else "the columns are those of this form"
    how = "the model's chat template" if chat else "plain paragraphs, since the model has no chat template"
    return Format(settings, f"{what}; rendered with {how}; the assistant's part is learnt")


def _kind(rows: Iterable[Row], name: str) -> str:
    values = [row[name] for row in rows if row.get(name) is not None]
    if values and all(isinstance(value, str) for value in values):
        return "text"
    if values and all(isinstance(value, (int, float)) for value in values):
        return "number"
    return "turns" if values and all(_are_turns(value) for value in values) else "other"


def _are_turns(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and "content" in turn
        for turn in value
    )


def _undecided(message: str, kinds: Mapping[str, str], texts: Sequence[str] = ()) -> ConfigError:
    there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    shown = _headed(texts or ["question", "answer"]).replace("\n", "\\n")
    return ConfigError(
        f"{message}; the columns are {there}",
        where="--data",
        fix=f"Say how a row reads, for example --template '{shown}'.",
    )


def label_set(texts: Sequence[Text], settings: Mapping[str, Any]) -> list[str] | None:
    """The label set, when the completions are one: at most 20, short, one line, and each used often."""
    if settings.get("train_on") != "completion" and not settings.get("chat_template"):
        return None
    distinct = sorted({text.answer.strip() for text in texts})
    few = 2 <= len(distinct) <= min(20, len(texts) // 4)
    return distinct if few and all(0 < len(x) <= 40 and "\n" not in x for x in distinct) else None
