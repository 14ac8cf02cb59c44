"""What training will see, found without a heavy import: rows, one sample, and counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from olive.config.base import Frozen
from olive.config.workflow import DataConfig, PreProcess
from olive.data import preference
from olive.data.blocks import Blocks, build, build_held_out, settings_missing
from olive.data.formats import turns
from olive.data.mixture import Group, MixedRow, groups
from olive.data.rows import columns, is_local, read, where
from olive.data.runtime import Question
from olive.data.size import sample, streams
from olive.data.split import split_rows, wanted_rows
from olive.data.template import Text, check, check_turns, render_all
from olive.data.tokens import LightTokenizer, load
from olive.errors import OliveError, Problem, Severity, raise_errors

_COUNTED = 20_000  # rows tokenised for the counts; more are estimated from that many
_COUNTED_CHATS = 2_000  # the same for conversations: a chat template takes longer to render


class PartPreview(Frozen):
    """Rows that become text in the same way: all rows of a dataset, or those of one part of a mix.

    Attributes:
        name: of the data config they are from.
        rows: how many there are; a row drawn twice counts twice.
        format: form of the chat data; empty where a template of the document's own says what a row is.
        detected: whether the format was found in the data, not named.
        rendering: what chat turns are rendered with.
        train_on: what of the text is learnt; ``pair`` where two answers are compared.
    """

    name: str
    rows: int
    format: str = ""
    detected: bool = False
    rendering: str = ""
    train_on: str = "all"


class Preview(Frozen):
    """A data config, looked at before any time is spent.

    Attributes:
        name: of the data config.
        rows: rows in the split; 0 when they can only be read at the run.
        columns: their columns.
        parts: the rows by how they become text; more than one for a mix alone.
        max_rows: the limit that left rows out; 0 where none did.
        blocks: training sequences.
        tokens: tokens in all blocks.
        trained_tokens: positions that carry a loss.
        longest_block: tokens in the longest block.
        eval_rows, eval_blocks: the part split off for evaluation.
        estimated: whether the counts are scaled up from a part of the rows.
        streamed: whether rows are read some at a time; then their number is an estimate too.
        prompt, completion: the first row, rendered; of a pair, the chosen answer.
        rejected: the rejected answer of the first row; empty where rows are no pairs, else each is a block.
        ids, labels: the first row, tokenised; -100 marks what is not learnt.
        problems: warnings and notes.
    """

    name: str
    rows: int = 0
    columns: tuple[str, ...] = ()
    parts: tuple[PartPreview, ...] = ()
    max_rows: int = 0
    blocks: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_block: int = 0
    eval_rows: int = 0
    eval_blocks: int = 0
    estimated: bool = False
    streamed: bool = False
    prompt: str = ""
    completion: str = ""
    rejected: str = ""
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    problems: tuple[Problem, ...] = ()


def look(config: DataConfig, base_dir: Path) -> Preview:
    """Look at rows of numbers, which become no text: how many there are, and their columns.

    Raises:
        OliveError: the rows cannot be read.
    """
    if not is_local(config, base_dir):
        return Preview(name=config.name, problems=tuple(_remote(config, base_dir)))
    try:
        rows = read(config, base_dir)
    except OliveError as error:
        raise type(error)(problems=[_located(problem, config) for problem in error.problems]) from error
    return Preview(name=config.name, rows=len(rows), columns=columns(rows))


def preview(
    config: DataConfig,
    base_dir: Path,
    tokenizer_folder: Path | None,
    *,
    eval_size: float = 0,
    seed: int | None = None,
    runtime: bool = False,
    memory: int | None = None,
    pairs: bool = False,
) -> Preview:
    """Look at a data config as training will.

    Args:
        config: the data config.
        base_dir: folder that relative paths are looked up in.
        tokenizer_folder: the model's folder; None leaves the token counts at 0.
        eval_size: as ``eval_dataset_size``: what is split off before the blocks are made.
        seed: the training's seed; None where it has none.
        runtime: ask ONNX Runtime GenAI too how it reads the first row; what it reads otherwise is an error
            among the problems.
        memory: free bytes; data that would fill them is looked at in part, as it is to be read as a stream.
        pairs: rows are read as pairs of a chosen and a rejected answer.

    Raises:
        OliveError: anything that would fail at the run; every fault found is in the one error.
    """
    try:
        return _preview(config, base_dir, tokenizer_folder, eval_size, seed, runtime, memory, pairs)
    except OliveError as error:
        raise type(error)(problems=[_located(problem, config) for problem in error.problems]) from error


def _preview(
    config: DataConfig,
    base_dir: Path,
    tokenizer_folder: Path | None,
    eval_size: float,
    seed: int | None,
    runtime: bool,
    memory: int | None,
    pairs: bool,
) -> Preview:
    pre = config.pre_process_data_config
    missing = [] if pairs else settings_missing(pre)
    if not is_local(config, base_dir):
        raise_errors(missing)
        return Preview(name=config.name, problems=tuple(_remote(config, base_dir)))
    streamed = memory is not None and streams(config, base_dir, memory, pairs=pairs)
    looked_at = sample(config, base_dir) if streamed else None
    rows = looked_at.rows if looked_at else read(config, base_dir)
    total = looked_at.total if looked_at else len(rows)
    parts = groups(pre, rows)
    fit = preference.check if pairs else check
    raise_errors([*missing, *(problem for part in parts for problem in fit(part.pre, columns(part.rows)))])
    found: dict[str, Any] = {"name": config.name, "rows": total, "columns": columns(rows)}
    found["streamed"] = streamed
    if config.load_dataset_config.max_rows == total:
        found["max_rows"] = total
    tokenizer = load(tokenizer_folder) if tokenizer_folder is not None else None
    found["parts"] = tuple(_part(config, part, tokenizer, total / len(rows), pairs) for part in parts)
    chat = tokenizer.chat if tokenizer else None
    for part in parts:
        if chats(part.pre):
            check_turns(part.pre, part.rows)
        else:
            render_all(pre, part.rows, chat)
    first = next(part for part in parts if 0 in part.places)
    text = render_all(pre, rows[:1], chat)[0]
    if pairs:
        text, other = preference.render(first.pre, rows[0], chat)
        found["rejected"] = other.completion
    found |= {"prompt": text.prompt, "completion": text.completion}
    # of a sample, as large a share as of all rows
    share = eval_size if eval_size < 1 or looked_at is None else min(eval_size / total, 0.5)
    train, evaluation = split_rows(rows, share, seed or 0, pre)
    held_rows = found["eval_rows"] = wanted_rows(eval_size, total) if looked_at else len(evaluation)
    if tokenizer is None:
        return Preview(**found)
    encoded = tokenizer.encode_row(
        text, first.pre.model_copy(update={"train_on": "completion"}) if pairs else first.pre
    )
    found |= {"ids": tuple(encoded.ids), "labels": tuple(encoded.labels)}
    with _question(first.pre, rows[0], text, tokenizer, tokenizer_folder if runtime else None) as asked:
        more = (total - held_rows) / len(train)
        counts, blocks = _counts(train, config, tokenizer, seed, more, pairs=pairs)
        problems = [*blocks.notes, *([_streamed(total, len(rows))] if streamed else [])]
        if evaluation:
            more = held_rows / len(evaluation)
            held, held_blocks = _counts(evaluation, config, tokenizer, seed, more, pairs=pairs, held_out=True)
            found["eval_blocks"] = held["blocks"]
            problems += [
                replace(note, message=f"evaluation part: {note.message}") for note in held_blocks.notes
            ]
        problems += asked.problems(tokenizer.encode(text.full), text.prompt or None)
    located = tuple(_located(problem, config) for problem in problems)
    return Preview(**found, **counts, problems=located)


def chats(pre: PreProcess) -> bool:
    """Whether rows are conversations; ``pre`` is resolved."""
    return bool(pre.chat_template) or pre.format is not None


def _part(
    config: DataConfig, group: Group, tokenizer: LightTokenizer | None, scale: float, pairs: bool
) -> PartPreview:
    """How rows become text, for the reader of the plan."""
    pre, row = group.pre, group.rows[0]
    made = PartPreview(
        name=row.source if isinstance(row, MixedRow) else config.name,
        rows=round(len(group.rows) * scale),
        train_on="pair" if pairs else pre.train_on or "all",
    )
    if not chats(pre):
        return made
    own = isinstance(pre.chat_template, str)
    known = own or (tokenizer is not None and tokenizer.chat is not None)
    rendering = "the document's chat template" if own else "the model's chat template"
    named = {member.name: member for member in _all_members(config)}[made.name].pre_process_data_config
    return made.model_copy(
        update={
            "format": pre.format or "messages",
            "detected": named.format in (None, "auto") and not named.chat_template,
            "rendering": rendering
            if known or tokenizer is None
            else "plain paragraphs: it has no chat template",
        }
    )


def _question(
    pre: PreProcess, row: Mapping[str, Any], text: Text, tokenizer: LightTokenizer, folder: Path | None
) -> Question:
    """The first row, for the runtime to read; with its prompt's turns where a chat template renders them."""
    template = pre.chat_template if isinstance(pre.chat_template, str) else None
    template = template or (tokenizer.chat.source if tokenizer.chat else None)
    if not chats(pre) or not text.prompt or template is None:
        return Question(folder, text.full)
    return Question(folder, text.full, template, turns(pre, row)[:-1])


def _all_members(config: DataConfig) -> Iterator[DataConfig]:
    yield config
    for member in config.members:
        yield from _all_members(member)


def _counts(
    rows: list[dict[str, Any]],
    config: DataConfig,
    tokenizer: LightTokenizer,
    seed: int | None,
    more: float,
    *,
    pairs: bool = False,
    held_out: bool = False,
) -> tuple[Mapping[str, Any], Blocks]:
    """Counts over all rows, ``more`` times those given, and the blocks of those tokenised."""
    pre = config.pre_process_data_config
    slow = any(chats(part.pre) for part in groups(pre, rows))
    chosen, limit = rows, _COUNTED_CHATS if slow else _COUNTED
    if len(rows) > limit:
        chosen = [rows[index * len(rows) // limit] for index in range(limit)]
    make = preference.build if pairs else build_held_out if held_out else build
    blocks = make(chosen, pre, tokenizer, seed)
    scale = more * len(rows) / len(chosen)
    if pre.max_samples is not None:
        scale = min(scale, pre.max_samples / len(blocks))
    return {
        "blocks": round(len(blocks) * scale),
        "tokens": round(blocks.tokens * scale),
        "trained_tokens": round(blocks.trained_tokens * scale),
        "longest_block": max(len(block.ids) for block in blocks),
        "estimated": scale != 1 and (more != 1 or len(chosen) < len(rows)),
    }, blocks


def _streamed(total: int, looked_at: int) -> Problem:
    return Problem(
        f"read as a stream, for it is large or streaming is true: about {total:,} rows, of which the plan "
        f"looked at the first {looked_at:,}; the others are checked at the run",
        severity=Severity.NOTE,
    )


def _remote(config: DataConfig, base_dir: Path) -> list[Problem]:
    """What to say of data that only the run reads; of each such part of a mix."""
    if config.mix:
        return [p for m in config.members if not is_local(m, base_dir) for p in _remote(m, base_dir)]
    load = config.load_dataset_config
    at_run = Problem(
        f"dataset {load.data_name!r} is no local file or folder: its rows are checked at the run",
        where(config),
        severity=Severity.NOTE,
    )
    if load.revision is not None or load.data_files is not None:
        return [at_run]
    unpinned = Problem(
        f"dataset {load.data_name!r} has no revision: a later version of it would count as the same data",
        where(config),
        "set revision in load_dataset_config",
        severity=Severity.WARNING,
    )
    return [at_run, unpinned]


def _located(problem: Problem, config: DataConfig) -> Problem:
    prefix = where(config)
    if problem.where is None:
        return replace(problem, where=prefix)
    return (
        problem if problem.where.startswith(prefix) else replace(problem, where=f"{prefix}: {problem.where}")
    )
