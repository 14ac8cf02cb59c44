"""The parity gate of a model whose weights became integers and that still is a Hugging Face folder."""

from __future__ import annotations

import gc
from pathlib import Path

from olive.config.gates import ParityGate
from olive.engine.gates.compare import References, compare, probes, torch_logits
from olive.engine.gates.layer_kl import by_layer, fits
from olive.engine.result import GateResult
from olive.engine.rungs import advice
from olive.errors import GateFailed, PassFailed
from olive.models.artifact import Artifact
from olive.models.hf import describe, load_model, read_json
from olive.passes.base import PassContext

_FLAT, _SHARP = 0.995, 0.97


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
    expected = known.take(before.path, chosen) if known else None
    told = fits(describe(before.path).parameters, ctx.machine.memory_available)
    layers: dict[str, float] = {}
    if told or expected is None:
        source = load_model(before.path, dtype="float32")
        expected = expected or torch_logits(source, chosen)
        layers = by_layer(source, after, chosen) if told else {}
        del source
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
                fix=advice(ctx.facts),
                figures=found.figures,
                limits=limits,
            )
    text = f"{precision}: KL {found.kl:.3g} nat a token, top token agrees at {found.top1:.0%} of positions"
    return GateResult(
        gate="parity", passed=True, figures=found.figures, limits=limits, text=text, layers=layers
    )
