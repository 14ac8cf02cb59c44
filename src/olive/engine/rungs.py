"""What brings integers nearer to their source, the cheapest first: read off the layers that were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olive.passes.quantize.precision import OUTPUTS
from olive.passes.quantize.targets import RUNGS, Override

_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True, slots=True)
class Change:
    """One way to take a rung.

    Attributes:
        text: what it is.
        edit: the document's own words for it.
        overrides: what it puts over the pass's parameters.
    """

    text: str
    edit: str
    overrides: Mapping[str, Override]


def changes(rung: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Change]:
    """The ways to take ``lm_head``, ``down_proj`` or ``group_size``, the one to prefer first; none where it
    would change nothing.

    Args:
        rung: its name.
        rows: ``layers`` of a quantising pass's facts.
    """
    low = [row for row in rows if row["bits"] < 8]
    if rung in ("lm_head", "down_proj"):
        names = {"lm_head"} if rung == "lm_head" else OUTPUTS
        last = sorted({row["name"].rpartition(".")[2] for row in low} & names)
        patterns = ["lm_head" if name == "lm_head" else f"*.{name}" for name in last]
        if patterns:
            edit = json.dumps({pattern: {"bits": 8} for pattern in patterns})
            over = {pattern: Override(bits=8) for pattern in patterns}
            yield Change(f"8 bits for {', '.join(patterns)}", f'"overrides": {edit}', over)
    elif rung == "group_size":
        for size in _BLOCKS:
            wider = [row["name"] for row in low if row["group_size"] == -1 or row["group_size"] > size]
            if wider:
                over = {name: Override(group_size=size) for name in wider}
                yield Change(f"blocks of {size}", f'"group_size": {size}', over)


def advice(facts: Mapping[str, Any]) -> str:
    """Edits of the document that help, one after the other.

    Args:
        facts: of a quantising pass: its ``method`` and its ``layers``.
    """
    found = (next(changes(rung, facts.get("layers") or []), None) for rung in RUNGS)
    edits = [change.edit for change in found if change is not None]
    if facts.get("method") != "Gptq":
        edits.append('"type": "Gptq", with a data_config to calibrate on')
    if not edits:
        return 'Set "bits": 8, or use SelectiveMixedPrecision with a larger budget before it.'
    edits.append('or all of that unasked: "fallback": true')
    return f"Edit the quantising pass, one after the other until it passes: {'; '.join(edits)}."
