"""The merge gate: the merged model is the base plus the adapter, and nothing else."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any, NoReturn

from olive.config.workflow import MergeGate
from olive.engine.gates.compare import compare, probes, torch_logits
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact
from olive.passes.adapters import lora_weights
from olive.passes.adapters.stream import LazyTensors
from olive.passes.base import PassContext

_MAX_KL = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}
_EPSILON = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_PROMPTS = 8


def check(
    before: Artifact, after: Path, settings: MergeGate, ctx: PassContext, prompts: list[list[int]]
) -> GateResult:
    """Hold a merged model against its adapter and base.

    Every tensor of the adapter is used, every target changed, each change is ``scale B A`` to the rounding of
    the stored dtype, every other tensor is the base's; then KL(base + adapter, merged) on the prompts,
    where PEFT computes base + adapter.

    Args:
        before: the adapter, with its base.
        after: folder of the merged model.
        settings: thresholds.
        ctx: context of the merge.
        prompts: token ids.

    Raises:
        PassFailed: any of it does not hold.
    """
    if before.base is None:
        _fail("the adapter names no base model", "Set input_model.model_path to the model it was trained on.")
    recorded = before.attributes.get("base_digest")
    if recorded and recorded != before.base.digest:
        _fail(
            f"trained on another base (digest {recorded[:12]}) than merged into ({before.base.digest[:12]})",
            "Merge into the model the adapter was trained on, or train it on this one.",
        )
    figures = _check_tensors(before.path, before.base.path, after)
    limit = settings.max_kl or _MAX_KL[_stored(after)]
    mean, worst = _divergence(before, after, prompts)
    figures |= {"kl": mean, "kl_worst_position": worst}
    if not mean <= limit:
        _fail(
            f"KL(base + adapter, merged) is {mean:.3g} nat a token, above {limit:.3g}",
            "Merge in float32 (MergeAdapterWeights dtype), or raise gates.merge.max_kl.",
        )
    text = f"{int(figures['changed'])} of {int(figures['targets'])} target tensors changed as trained"
    return GateResult(gate="merge", passed=True, figures=figures, limits={"kl": limit}, text=text)


def _fail(message: str, fix: str) -> NoReturn:
    raise PassFailed(f"merge gate: {message}", where="MergeAdapterWeights", fix=fix)


def _check_tensors(adapter_folder: Path, base_folder: Path, merged_folder: Path) -> dict[str, float]:
    adapter = lora_weights.read(adapter_folder)
    with (
        LazyTensors(base_folder) as base,
        LazyTensors(adapter_folder) as factors,
        LazyTensors(merged_folder) as merged,
    ):
        lost = [*adapter.foreign, *sorted(name for name in adapter.targets if name not in merged)]
        if lost or not adapter.targets:
            _fail(
                f"{len(lost)} of {len(factors)} tensors of the adapter are unused: {', '.join(lost[:3])}",
                "The adapter belongs to another model: its names do not occur in this one.",
            )
        missing = sorted(name for name in base if name not in merged)
        if missing:
            _fail(
                f"the merged model lacks {', '.join(missing[:3])}",
                "Run again; if it stays, this is our defect.",
            )
        figures = {"targets": float(len(adapter.targets)), "changed": 0.0, "error": 0.0, "change": 0.0}
        change = norm = 0.0
        for name in merged:
            source = name if name in base else _TIED.get(name, name)
            if source not in base:
                _fail(
                    f"the merged model has {name}, which the base has not", "Run again; this is our defect."
                )
            value, original = merged[name], base[source]
            if value.shape != original.shape:
                _fail(
                    f"{name} has shape {tuple(value.shape)}, in the base {tuple(original.shape)}",
                    "Merge into the model the adapter was trained on.",
                )
            if name not in adapter.targets:
                if not value.equal(original.to(value.dtype)):
                    _fail(
                        f"{name} differs from the base and no adapter tensor says so",
                        "The base is not the one used.",
                    )
                continue
            original, value = original.float(), value.float()
            _check_changed(name, value, original)
            figures["changed"] += 1
            delta = adapter.deltas.get(name)
            if delta is None:
                wanted = factors[adapter.replaced[name]].float()
            else:
                wanted = original + lora_weights.product(factors[delta.a], factors[delta.b], delta)
            change += float((wanted - original).square().sum(dtype=_double()))
            norm += float(original.square().sum(dtype=_double()))
            # One rounding to the stored dtype, one in float32 for the sum itself.
            error = (value - wanted).abs()
            bound = (
                2 * _EPSILON[merged.code(name)] * (wanted.abs() + original.abs())
                + 1e-7 * original.abs().max()
            )
            figures["error"] = max(figures["error"], float(error.max()))
            if not bool((error <= bound).all()):
                _fail(
                    f"the change of {name} is not scale times B A: off by up to {float(error.max()):.3g}",
                    "The base or the scale differs from the one merged with; merge this adapter again.",
                )
        figures["change"] = (change / norm) ** 0.5 if norm else 0.0
    return figures


def _check_changed(name: str, value: Any, original: Any) -> None:
    if value.equal(original):
        _fail(
            f"{name} is a target of the adapter and did not change",
            "The adapter's B is zero there, or the change is below the resolution of the stored dtype: "
            "train longer, or merge with dtype float32.",
        )


def _double() -> Any:
    import torch

    return torch.float64


def _stored(folder: Path) -> str:
    with LazyTensors(folder) as merged:
        codes = {merged.code(name) for name in merged}
    return next((code for code in ("BF16", "F16") if code in codes), "F32")


def _divergence(before: Artifact, after: Path, prompts: list[list[int]]) -> tuple[float, float]:
    """Mean and worst KL(base + adapter, merged), nat a token, both in float32."""
    from olive.models.adapter import load_adapter
    from olive.models.hf import load_model

    assert before.base is not None  # noqa: S101 - checked by the caller
    vocabulary = int(json.loads((after / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    chosen = probes(prompts, vocabulary, _PROMPTS)
    model = load_adapter(before.base.path, before.path, "float32").eval()
    expected = torch_logits(model, chosen)
    del model
    gc.collect()
    merged = load_model(after, dtype="float32").eval()
    found = compare(expected, chosen, lambda ids: torch_logits(merged, [ids])[0])
    return (found.kl if not found.bad else float("nan")), found.kl_max
