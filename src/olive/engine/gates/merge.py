"""The merge gate: the merged model is the base plus the adapter, and nothing else."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from olive.config.gates import MergeGate
from olive.engine.gates.compare import Comparison, References, compare, probes, torch_logits
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models import seen
from olive.models.artifact import Artifact
from olive.models.stream import LazyTensors, SeenTensors
from olive.passes.adapters import lora_weights
from olive.passes.base import PassContext

if TYPE_CHECKING:
    import torch

_MAX_KL = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}
_EPSILON = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PROMPTS = 8
_MIN_KEPT = 0.5
_CELLS = 8 << 20  # elements looked at at once
_DEFECT = "Run again; if it stays, this is our defect."


def check(
    before: Artifact,
    after: Path,
    settings: MergeGate,
    ctx: PassContext,
    prompts: list[list[int]],
    known: References | None = None,
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
        known: takes the merged model's logits, for the next gate.

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
    found = _divergence(before, after, prompts, known)
    if found.bad:
        _fail(
            f"the merged model gives NaN or infinity at {found.bad} of {found.positions} positions",
            "Merge with MergeAdapterWeights dtype float32.",
        )
    if not found.kl <= limit:
        _fail(
            f"KL(base + adapter, merged) is {found.kl:.3g} nat a token, above {limit:.3g}",
            "Merge in float32 (MergeAdapterWeights dtype), or raise gates.merge.max_kl.",
        )
    figures |= {"kl": found.kl, "kl_worst_position": found.kl_max, "positions": float(found.positions)}
    limits = {"kl": limit, "min_kept": _MIN_KEPT}
    text = f"{int(figures['changed'])} of {int(figures['targets'])} target tensors changed as trained"
    return GateResult(gate="merge", passed=True, figures=figures, limits=limits, text=text)


def _fail(message: str, fix: str) -> NoReturn:
    raise PassFailed(f"merge gate: {message}", where="MergeAdapterWeights", fix=fix)


@dataclass(slots=True)
class _Tally:
    """What was found over all tensors.

    Attributes:
        targets: tensors that the adapter changes.
        error: largest distance of an element from base plus change.
        change, norm: sums of squares of the changes and of the base tensors changed.
        kept: smallest share of a tensor's change that survived the stored dtype.
    """

    targets: int = 0
    error: float = 0.0
    change: float = 0.0
    norm: float = 0.0
    kept: float = math.inf

    def figures(self) -> dict[str, float]:
        """As the result has them; every target changed, or the gate had failed."""
        return {
            "targets": float(self.targets),
            "changed": float(self.targets),
            "error": self.error,
            "change": (self.change / self.norm) ** 0.5 if self.norm else 0.0,
            "kept": self.kept,
        }


def _check_tensors(adapter_folder: Path, base_folder: Path, merged_folder: Path) -> dict[str, float]:
    adapter = lora_weights.read(adapter_folder)
    with (
        SeenTensors(base_folder, seen.read(adapter_folder)) as base,
        LazyTensors(adapter_folder) as factors,
        LazyTensors(merged_folder) as merged,
    ):
        # Where embedding and head are one tensor, the head goes by the embedding's name.
        names = [*merged, *([_HEAD] if _HEAD in adapter.replaced and _HEAD not in merged else [])]
        _check_names(adapter, base, factors, names)
        tally = _Tally()
        for name in names:
            stored = name if name in merged else _EMBEDDING
            source = name if name in base else _EMBEDDING
            if merged.shape(stored) != base.shape(source):
                _fail(
                    f"{name} has shape {merged.shape(stored)}, in the base {base.shape(source)}",
                    "Merge into the model the adapter was trained on.",
                )
            value, original = merged[stored], base[source]
            if name in adapter.targets:
                _check_change(tally, adapter, factors, name, value, original, merged.code(stored))
            elif not value.equal(original.to(value.dtype)):
                _check_finite(name, value)
                _fail(
                    f"{name} differs from the base and no adapter tensor says so",
                    "The merged model was made from another base: run again from the one named here.",
                )
        if not tally.targets:
            _fail("the adapter changes nothing", "Train it longer, or with a higher learning rate.")
        return tally.figures()


def _check_names(
    adapter: lora_weights.Adapter, base: LazyTensors, factors: LazyTensors, merged: list[str]
) -> None:
    lost = [*adapter.foreign, *sorted(name for name in adapter.targets if name not in merged)]
    if lost or not adapter.targets:
        _fail(
            f"{len(lost)} of {len(factors)} tensors of the adapter are unused: {', '.join(lost[:3])}"
            if lost
            else "the adapter holds no tensors",
            "The adapter belongs to another model: its names do not occur in this one.",
        )
    if missing := sorted(name for name in base if name not in merged):
        _fail(f"the merged model lacks {', '.join(missing[:3])}", _DEFECT)
    tied = _HEAD not in base and _EMBEDDING in base
    if surplus := [name for name in merged if name not in base and not (tied and name == _HEAD)]:
        _fail(f"the merged model has {', '.join(surplus[:3])}, which the base has not", _DEFECT)


def _check_change(
    tally: _Tally,
    adapter: lora_weights.Adapter,
    factors: LazyTensors,
    name: str,
    value: torch.Tensor,
    original: torch.Tensor,
    code: str,
) -> None:
    """``value`` is ``original`` plus what the adapter trained, to the rounding of the stored dtype."""
    import torch

    delta, replaced = adapter.deltas.get(name), adapter.replaced.get(name)
    product = adapter.products.get(name)
    start = factors[replaced] if replaced else original
    if (
        delta is None
        and product is None
        and _is_copy(adapter, name)
        and start.float().equal(original.float())
    ):
        if not value.equal(original.to(value.dtype)):
            _fail(f"{name} differs from the base and the adapter says it must not", _DEFECT)
        return
    along = squares = norm = worst = 0.0
    changed, off = False, False
    for rows in _blocks(original):
        base, got, wanted = original[rows].float(), value[rows].float(), start[rows].float()
        if delta is not None:
            wanted = _changed(factors, delta, rows, wanted)
        elif product is not None:
            wanted = wanted + _rows_of_product(factors, product, rows)
        _check_finite(name, got)
        trained, stored = wanted - base, got - base
        changed |= bool(stored.any())
        along += float((stored * trained).sum(dtype=torch.float64))
        squares += float(trained.square().sum(dtype=torch.float64))
        norm += float(base.square().sum(dtype=torch.float64))
        # One rounding to the stored dtype, one in float32 for the sum itself.
        error = (got - wanted).abs()
        bound = 2 * _EPSILON[code] * (wanted.abs() + base.abs())
        bound += 1e-7 * base.abs().max() + 1e-6 * trained.abs().max()
        worst = max(worst, float(error.max()))
        off |= not bool((error <= bound).all())
    if not (changed and squares):
        _fail(
            f"{name} is a target of the adapter and did not change",
            "Merge with MergeAdapterWeights dtype float32: the change is below the resolution of the dtype."
            if squares
            else "The adapter's B is zero there: train longer, or with a higher learning rate.",
        )
    if off:
        plain = delta is not None and delta.magnitude is None
        what = "scale times B A" if plain else "what was trained"
        _fail(
            f"the change of {name} is not {what}: off by up to {worst:.3g}",
            "The base or the scale differs from the one merged with; merge this adapter again.",
        )
    kept = along / squares
    if kept < _MIN_KEPT:
        _fail(
            f"{kept:.0%} of the change of {name} is left after rounding",
            "Merge with MergeAdapterWeights dtype float32: the change is below the resolution of the dtype.",
        )
    tally.error = max(tally.error, worst)
    tally.targets += 1
    tally.change += squares
    tally.norm += norm
    tally.kept = min(tally.kept, kept)


def _changed(
    factors: LazyTensors, delta: lora_weights.Delta, rows: slice, start: torch.Tensor
) -> torch.Tensor:
    """Those rows with ``scale B A`` and the trained length, by other code than the merge's."""
    a, b = factors[delta.a].float(), factors[delta.b].float()
    product = delta.scale * (a[:, rows].T @ b.T if delta.transposed else b[rows] @ a)
    if product.shape != start.shape:
        _fail(
            f"the adapter was trained on another shape of {delta.target}",
            "Merge into the model the adapter was trained on.",
        )
    if delta.magnitude is None:
        return start + product
    whole = (start + product).double()
    length = factors[delta.magnitude].view(-1)[rows, None].double()
    return (whole * (length / whole.square().sum(1, keepdim=True).sqrt())).float()


def _rows_of_product(factors: LazyTensors, product: lora_weights.Product, rows: slice) -> torch.Tensor:
    """Those rows of ``scale`` times the product, by other code than the merge's."""
    import torch

    halves = []
    for half in ("w1", "w2"):
        names = [product.parts[part] for part in (half, f"{half}_a", f"{half}_b") if part in product.parts]
        value = factors[names[0]].float()
        halves.append(
            value if len(names) == 1 else torch.einsum("ir,rj->ij", value, factors[names[1]].float())
        )
    first, second = halves
    if product.kind == "hada":
        return product.scale * first[rows] * second[rows]
    numbers = torch.arange(first.shape[0] * second.shape[0])[rows]
    outer, inner = first[numbers // second.shape[0]], second[numbers % second.shape[0]]
    return product.scale * (outer[:, :, None] * inner[:, None, :]).flatten(1)


def _is_copy(adapter: lora_weights.Adapter, name: str) -> bool:
    """Whether PEFT may have put the tensor beside the adapter without training it, as it does with tables."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    return name in (_EMBEDDING, _HEAD) and module not in (adapter.config.get("modules_to_save") or ())


def _blocks(tensor: torch.Tensor) -> Iterator[slice]:
    """Rows of the tensor, few enough that their copies stay small."""
    rows = max(1, _CELLS * len(tensor) // max(tensor.numel(), 1))
    return (slice(start, start + rows) for start in range(0, len(tensor), rows))


def _check_finite(name: str, value: torch.Tensor) -> None:
    if not bool(value.isfinite().all()):
        _fail(
            f"NaN or infinity in {name}",
            "Look for it in the base and the adapter; if only the adapter has it, train with a lower "
            "learning rate.",
        )


def _stored(folder: Path) -> str:
    with LazyTensors(folder) as merged:
        codes = {merged.code(name) for name in merged}
    return next((code for code in ("BF16", "F16") if code in codes), "F32")


def _divergence(
    before: Artifact, after: Path, prompts: list[list[int]], known: References | None
) -> Comparison:
    """(base + adapter, merged), both in float32, one after the other in memory."""
    from olive.models.adapter import load_adapter
    from olive.models.hf import load_model

    assert before.base is not None  # noqa: S101 - checked by the caller
    model = load_adapter(before.base.path, before.path, "float32")
    chosen = probes(prompts, int(model.config.get_text_config().vocab_size), _PROMPTS)
    expected = torch_logits(model, chosen)
    del model
    gc.collect()
    got = torch_logits(load_model(after, dtype="float32"), chosen)
    if known is not None:
        known.keep(after, chosen, got)
    return compare(expected, got)
