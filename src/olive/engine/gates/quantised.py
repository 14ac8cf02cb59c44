"""The parity gate of a model whose weights became integers and that still is a Hugging Face folder."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.config.workflow import ParityGate
from olive.engine.gates.compare import References, compare, probes, torch_logits
from olive.engine.result import GateResult
from olive.errors import GateFailed, PassFailed
from olive.models.artifact import Artifact
from olive.models.hf import load_model, read_json
from olive.passes.base import PassContext

_FLAT, _SHARP = 0.995, 0.97
_BLOCKS = (256, 128, 64, 32, 16)


def ladder(facts: Mapping[str, Any]) -> str:
    """Edits of the pass that bring it nearer to its source, the cheapest first, as the document has them.

    Args:
        facts: of a quantising pass: its ``method`` and its ``layers``.
    """
    rows = facts.get("layers") or []
    low = {row["name"].rpartition(".")[2] for row in rows if row["bits"] < 8}
    edits = []
    if "lm_head" in low:
        edits.append('"overrides": {"lm_head": {"bits": 8}}')
    if "down_proj" in low:
        edits.append('"overrides": {"*.down_proj": {"bits": 8}}')
    group = max((row["group_size"] for row in rows if row["bits"] < 8), default=0)
    whole = any(row["group_size"] == -1 for row in rows if row["bits"] < 8)
    if smaller := next((size for size in _BLOCKS if whole or size < group), None):
        edits.append(f'"group_size": {32 if whole else smaller}')
    if facts.get("method") != "Gptq":
        edits.append('"type": "Gptq", with a data_config to calibrate on')
    if not edits:
        return 'Set "bits": 8, or use SelectiveMixedPrecision with a larger budget before it.'
    edits.append('or all of that unasked: "fallback": true')
    return f"Edit the quantising pass, one after the other until it passes: {'; '.join(edits)}."


def check(
    before: Artifact,
    after: Path,
    limits: dict[str, float],
    settings: ParityGate,
    ctx: PassContext,
    prompts: list[list[int]],
    known: References | None,
) -> GateResult:
    """Compare the logits of ``before`` with those of the integers in ``after``, both in float32 in PyTorch.

    Args:
        before: the model in floating point.
        after: the folder of integers.
        limits: ``kl`` in nat a token and ``top1`` that its precision explains.
        settings: thresholds of the document.
        ctx: context of the pass.
        prompts: token ids.
        known: may hold the logits of ``before``; takes those of ``after``, for the next gate.

    Raises:
        PassFailed: NaN, flat logits, or a distance above its limit.
    """
    where = str(ctx.facts.get("method", "quantisation"))
    precision = str(ctx.attributes.get("precision", "int4"))
    chosen = probes(prompts, int(read_json(after / "config.json")["vocab_size"]), settings.prompts)
    expected = (known.take(before.path, chosen) if known else None) or torch_logits(
        load_model(before.path, dtype="float32"), chosen
    )
    gc.collect()  # one model after the other
    if not all(bool(logits.isfinite().all()) for logits in expected):
        raise PassFailed(
            "parity gate: the model gives NaN or infinity before it is quantised",
            where=where,
            fix="Look at the passes before this one; of a fine-tuning, lower the learning rate.",
        )
    got = torch_logits(load_model(after, dtype="float32"), chosen)
    found = compare(expected, got)
    if known is not None:
        known.keep(after, chosen, got)
    figures = {
        "kl": found.kl,
        "kl_worst_position": found.kl_max,
        "top1": found.top1,
        "positions": float(found.positions),
        "flatness": found.flatness(1),
        "flatness_source": found.flatness(0),
    }
    flat = found.flatness(1) > _FLAT and found.flatness(0) < _SHARP
    for wrong, message in (
        (bool(found.bad), f"NaN or infinity at {found.bad} of {found.positions} positions"),
        (flat, f"flat logits: entropy {found.flatness(1):.1%} of a blind guess"),
        (
            not found.kl <= limits["kl"],
            f"KL(before, quantised) is {found.kl:.3g} nat a token, above {limits['kl']:.3g}",
        ),
        (
            not found.top1 >= limits["top1"],
            f"the top token agrees at {found.top1:.1%} of positions, below {limits['top1']:.1%}",
        ),
    ):
        if wrong:
            raise GateFailed(
                f"parity gate: {message} (precision {precision})",
                where=where,
                fix=ladder(ctx.facts),
                figures=figures,
                limits=limits,
            )
    text = f"{precision}: KL {found.kl:.3g} nat a token, top token agrees at {found.top1:.0%} of positions"
    return GateResult(gate="parity", passed=True, figures=figures, limits=limits, text=text)
