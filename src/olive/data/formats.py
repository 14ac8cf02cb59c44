"""Chat data in its usual forms: which one it is, and a row of it as turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from olive.config.workflow import Format, PreProcess
from olive.errors import ConfigError, Problem

Row = Mapping[str, Any]
Turns = list[Mapping[str, Any]]
_ROLES: dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def resolve(pre: PreProcess, rows: Sequence[Row]) -> PreProcess:
    """``pre`` with the format the rows have, and what is learnt of it.

    The format is looked for where the document asks for it with ``auto``, or where the document says nothing
    of how a row becomes text and the data has no column ``text``; columns of all rows and the values of the
    first tell it. Where none is found in the second case, ``pre`` comes back as it is.

    Raises:
        ConfigError: ``auto``, and the data has no known form; or it has several.
    """
    wanted = pre.format
    columns = dict.fromkeys(name for row in rows for name in row) if wanted in (None, "auto") else {}
    if wanted is None and (
        pre.chat_template or pre.text_template is not None or pre.text_cols != ("text",) or "text" in columns
    ):
        return _without(pre, columns)
    if wanted in (None, "auto"):
        found = _detect(pre, tuple(columns), rows[0] if rows else {})
        if not found and wanted is None:
            return _without(pre, columns)
        if len(found) != 1:
            raise _unclear(found, columns)
        wanted = found[0]
    return pre.model_copy(update={"format": wanted, "train_on": pre.train_on or "assistant"})


def needed(pre: PreProcess) -> tuple[str, ...]:
    """The columns that the format of ``pre`` reads; none where it has none."""
    if pre.format is None or pre.format == "auto":
        return ()
    return {"messages": (pre.message_col,), **_COLUMNS}[pre.format]


def unfit(pre: PreProcess, columns: Sequence[str]) -> list[Problem]:
    """The columns that the format needs and the data does not have, as problems."""
    have = f"the data has {listing(columns)}"
    return [
        Problem(f"format {pre.format} needs column {name!r}, which the data does not have", fix=have)
        for name in needed(pre)
        if name not in columns
    ]


def turns(pre: PreProcess, row: Row) -> Turns:
    """A row as turns: role and content, and whatever else a turn of ``messages`` carries.

    Raises:
        ConfigError: the row does not have the form that ``pre.format`` says.
    """
    made = _TURNS[pre.format or "messages"](pre, row)
    if not made:
        raise ConfigError("a conversation has no turn", fix="drop such rows")
    return made


def plain(pre: PreProcess, row: Row) -> tuple[str, str] | None:
    """Prompt and completion of a row that needs no turns when the model knows none; else None.

    Of a preference row, the completion is the chosen answer.
    """
    second = {"prompt-completion": "completion", "preference": "chosen"}.get(pre.format or "")
    if second and isinstance(row.get("prompt"), str) and isinstance(row.get(second), str):
        return row["prompt"], row[second]
    return None


def sides(row: Row) -> tuple[Turns, Turns, Turns]:
    """A preference row as the turns of its prompt, of the chosen and of the rejected answer.

    ``chosen`` and ``rejected`` hold answers to ``prompt``, or whole conversations; the prompt of those is
    what they begin with alike.

    Raises:
        ConfigError: the row is no preference row, or its prompt cannot be told.
    """
    prompt = row.get("prompt")
    asked = _checked(prompt, "prompt", "role") if isinstance(prompt, list) else []
    if isinstance(prompt, str):
        asked = [{"role": "user", "content": prompt}]
    chosen, rejected = (_answer(row.get(name), name) for name in ("chosen", "rejected"))
    answers = "assistant" in (chosen[0].get("role"), rejected[0].get("role"))
    if isinstance(prompt, list) and chosen[: len(asked)] == rejected[: len(asked)] == asked != []:
        chosen, rejected = chosen[len(asked) :], rejected[len(asked) :]
        if not (chosen and rejected):
            raise ConfigError("a preference row has no answer: its conversation is the prompt alone")
        return asked, chosen, rejected
    if isinstance(prompt, list) or answers:
        if not asked:
            raise ConfigError(
                "a preference row has no prompt",
                fix="add a column prompt, or let chosen and rejected be conversations that begin alike",
            )
        return asked, chosen, rejected
    most = min(len(chosen), len(rejected)) - 1
    alike = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    if not alike:
        raise ConfigError("the chosen and the rejected conversation have no turn in common to begin with")
    if isinstance(prompt, str) and all(turn.get("content") != prompt for turn in chosen[:alike]):
        raise ConfigError(
            "column 'prompt' is no turn of what the chosen and the rejected conversation begin with",
            fix="drop the column, or leave the prompt out of chosen and rejected",
        )
    return chosen[:alike], chosen[alike:], rejected[alike:]


def listing(columns: Sequence[str]) -> str:
    """The columns there are, for a message."""
    names = list(columns)
    return "columns " + ", ".join(names[:20]) + (" ..." if len(names) > 20 else "") if names else "no columns"


def is_turns(value: Any, *keys: str) -> bool:
    """Whether a value is a list of objects that have ``keys``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and all(key in turn for key in keys) for turn in value)
    )


def _without(pre: PreProcess, columns: Mapping[str, None]) -> PreProcess:
    """``pre`` as it is, for rows that are in no format; only chat turns have an assistant."""
    if pre.train_on == "assistant" and not pre.chat_template:
        raise ConfigError(
            "train_on is assistant, and the rows are not read as chat turns",
            fix=f"name their form as format; the data has {listing(list(columns))}",
        )
    return pre


def _detect(pre: PreProcess, columns: tuple[str, ...], first: Row) -> list[Format]:
    found: list[Format] = []
    if is_turns(first.get(pre.message_col), "role"):
        found.append("messages")
    talk = first.get("conversations")
    if pre.message_col != "conversations" and (
        is_turns(talk, "from", "value") or is_turns(talk, "role", "content")
    ):
        found.append("sharegpt")
    flat: tuple[Format, ...] = ("alpaca", "prompt-completion", "preference")
    return found + [name for name in flat if all(column in columns for column in _COLUMNS[name])]


def _unclear(found: Sequence[str], columns: Mapping[str, None]) -> ConfigError:
    have = f"the data has {listing(list(columns))}"
    if found:
        return ConfigError(
            f"the data may be {' or '.join(found)}: it has the columns of each",
            fix=f"name one of them as format; {have}",
        )
    return ConfigError(
        "format is auto, and the data has none of the forms known: messages, sharegpt, alpaca, "
        "prompt-completion, preference",
        fix=f"{have}; write a text_template over them, or name the turns' column as message_col",
    )


def _messages(pre: PreProcess, row: Row) -> Turns:
    keys = ("role",) if pre.format is not None else ()  # a template of one's own may read other keys
    return _checked(row.get(pre.message_col), pre.message_col, *keys)


def _checked(value: Any, column: str, *keys: str) -> Turns:
    if not is_turns(value, *keys):
        raise ConfigError(
            f"column {column!r} is not a list of chat turns",
            fix='each turn is an object such as {"role": "user", "content": "..."}',
        )
    return list(value)


def _sharegpt(pre: PreProcess, row: Row) -> Turns:
    talk = row.get("conversations")
    if not (is_turns(talk, "from", "value") or is_turns(talk, "role", "content")):
        raise ConfigError(
            "column 'conversations' is not a list of ShareGPT turns",
            fix='each turn is an object such as {"from": "human", "value": "..."}',
        )
    made = _system(row)
    for turn in talk or ():
        who = str(turn.get("from", turn.get("role")))
        if who not in _ROLES:
            raise ConfigError(
                f"a turn of column 'conversations' is from {who!r}, which is no role",
                fix=f"known are {', '.join(_ROLES)}",
            )
        content = turn.get("value", turn.get("content"))
        made.append({"role": _ROLES[who], "content": _text(content, "conversations")})
    return made


def _alpaca(pre: PreProcess, row: Row) -> Turns:
    asked = _text(row.get("instruction"), "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n{_text(row['input'], 'input')}"
    answer = _text(row.get("output"), "output")
    return [*_system(row), {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _prompt_completion(pre: PreProcess, row: Row) -> Turns:
    made: Turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(name)
        if isinstance(value, list):
            made += _checked(value, name, "role")
        else:
            made.append({"role": role, "content": _text(value, name)})
    return made


def _preference(pre: PreProcess, row: Row) -> Turns:
    prompt, chosen, _ = sides(row)
    return [*prompt, *chosen]


def _answer(value: Any, column: str) -> Turns:
    if isinstance(value, list):
        return _checked(value, column, "role")
    return [{"role": "assistant", "content": _text(value, column)}]


def _system(row: Row) -> Turns:
    """The system turn of a form that keeps it in a column of its own."""
    found = row.get("system")
    return [{"role": "system", "content": found}] if isinstance(found, str) and found else []


def _text(value: Any, column: str) -> str:
    if value is None:
        raise ConfigError(f"column {column!r} is null or missing", fix="drop such rows or fill them in")
    if not isinstance(value, str):
        raise ConfigError(f"column {column!r} holds {type(value).__name__}, not text")
    return value


_COLUMNS: dict[str, tuple[str, ...]] = {
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
}
_TURNS: dict[str, Callable[[PreProcess, Row], Turns]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "preference": _preference,
}
