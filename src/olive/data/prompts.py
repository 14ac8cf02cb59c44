"""Prompts and expected answers of rows, for evaluation and for the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from olive.config.workflow import PreProcess
from olive.data.template import Text, render_all
from olive.data.tokens import Tokenizer

Rows = Sequence[Mapping[str, Any]]


def texts(rows: Rows, pre: PreProcess, tokenizer: Tokenizer, n: int | None = None) -> list[Text]:
    """The rendered texts of ``n`` rows spread evenly over ``rows``; of all when ``n`` is None or larger."""
    if n is not None and n < len(rows):
        rows = [rows[index * len(rows) // n] for index in range(n)]
    return render_all(pre, rows, tokenizer.chat)


def prompts(
    rows: Rows, pre: PreProcess, tokenizer: Tokenizer, n: int | None = None
) -> tuple[list[list[int]], list[str]]:
    """What to generate from, and what is to be generated.

    Args:
        rows: column -> value.
        pre: template.
        tokenizer: of the model.
        n: how many rows, spread evenly over ``rows``; all when None or larger.

    Returns:
        Token ids, tokenised exactly as training saw them, and for each the value of the last field alone,
        stripped. A row without a prompt of its own (a single column) gives the first half of its text.
    """
    found = []
    chosen = texts(rows, pre, tokenizer, n)
    for text in chosen:
        if text.prompt:
            found.append(tokenizer.encode_prompt(text, pre))
        else:
            ids = tokenizer.encode_row(text, pre).ids
            found.append(ids[: max(1, len(ids) // 2)])
    return found, [text.answer.strip() for text in chosen]
