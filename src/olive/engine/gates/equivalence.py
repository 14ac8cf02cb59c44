"""The equivalence gate: a model whose weights were turned predicts what it predicted before."""

from __future__ import annotations

import gc
from pathlib import Path

from olive.config.gates import EquivalenceGate
from olive.engine.gates.compare import References, compare, probes, torch_logits
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact
from olive.models.hf import load_model, read_json
from olive.passes.base import PassContext

# of the stored dtype: KL in nat a token
_MAX_KL = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
_PROMPTS = 8


def check(
    before: Artifact,
    after: Path,
    settings: EquivalenceGate,
    ctx: PassContext,
    prompts: list[list[int]],
    known: References | None = None,
) -> GateResult:
    """Compare the logits of ``before`` and ``after`` at every position, both in float32 in PyTorch.

    Args:
        before: Hugging Face model.
        after: folder of the model made of it.
        settings: thresholds; by default by the dtype it is stored in.
        ctx: context of the pass.
        prompts: token ids.
        known: may hold the logits of ``before``; takes those of ``after``, for the next gate.

    Raises:
        PassFailed: NaN, or a distance above its limit.
    """
    where = str(ctx.facts.get("method", "rotation"))
    limit = settings.max_kl or _MAX_KL[str(ctx.attributes.get("dtype", "float32"))]
    chosen = probes(prompts, int(read_json(after / "config.json")["vocab_size"]), _PROMPTS)
    expected = (known.take(before.path, chosen) if known else None) or torch_logits(
        load_model(before.path, dtype="float32"), chosen
    )
    gc.collect()  # one model after the other
    got = torch_logits(load_model(after, dtype="float32"), chosen)
    if known is not None:
        known.keep(after, chosen, got)
    if not all(bool(logits.isfinite().all()) for logits in expected):
        raise PassFailed(
            "equivalence gate: the model gives NaN or infinity before it is rotated",
            where=where,
            fix="Look at the passes before this one; of a fine-tuning, lower the learning rate.",
        )
    found = compare(expected, got)
    fix = "Store it in float32 (dtype), or raise gates.equivalence.max_kl."
    if found.bad:
        raise PassFailed(
            f"equivalence gate: NaN or infinity at {found.bad} of {found.positions} positions",
            where=where,
            fix=fix,
        )
    if not found.kl <= limit:
        raise PassFailed(
            f"equivalence gate: KL(before, rotated) is {found.kl:.3g} nat a token, above {limit:.3g}",
            where=where,
            fix=fix,
        )
    text = f"KL {found.kl:.3g} nat a token, top token agrees at {found.top1:.1%} of positions"
    limits = {"kl": limit}
    return GateResult(gate="equivalence", passed=True, figures=found.figures, limits=limits, text=text)
