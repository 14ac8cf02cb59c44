"""The integers gate: a model written in another tool's format, read again, has the integers it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.config.gates import IntegersGate
from olive.engine.gates.compare import References
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact
from olive.models.hf import open_model, read_json
from olive.models.quantised import DequantisedTensors, Layer, layer_of
from olive.passes.base import PassContext

if TYPE_CHECKING:
    import torch

_FIX = "Report it with the model's config.json: the writer or the reader of this format is wrong."
_HALF = 2.0**-10  # a scale that was rounded to float16 or wider moves by less, unless it is tiny


def check(
    before: Artifact,
    after: Path,
    settings: IntegersGate,
    ctx: PassContext,
    prompts: list[list[int]] | None = None,
    known: References | None = None,
) -> GateResult:
    """Hold the integers of ``after``, by the reader of its format, against those of ``before``.

    Codes and zero points must be equal bit for bit; scales, and tensors in floating point, after rounding to
    the dtype they are stored in.

    Raises:
        PassFailed: naming the first tensor that differs.
    """
    where = str(ctx.facts.get("method", "SaveQuantized"))
    ours, own_config = open_model(before.path)
    theirs, config = open_model(after)
    layers = sorted(name.removesuffix(".qweight") for name in theirs if name.endswith(".qweight"))
    had = any(name.endswith(".qweight") for name in ours)
    if had and not layers and not ctx.facts.get("expanded"):
        raise PassFailed("integers gate: what was written holds no integers", where=where, fix=_FIX)
    worst, weights = 0.0, 0
    with ours, theirs:
        for name in layers:
            if f"{name}.qweight" not in ours:
                raise PassFailed(f"integers gate: {name} is new", where=where, fix=_FIX)
            kinds = layer_of(own_config, name), layer_of(config, name)
            one, other = (
                _codes(tensors, name, kind) for tensors, kind in zip((ours, theirs), kinds, strict=True)
            )
            weights += one[0].numel()
            worst = max(worst, _hold(name, one, other, (kinds[0].bits, kinds[1].bits), where))
    floats = _floats(before.path, after, where)
    figures = {
        "layers": float(len(layers)),
        "weights": float(weights),
        "scale_error": worst,
        "tensors_in_floating_point": float(floats),
    }
    text = f"{len(layers)} layers, {weights:,} integers identical; scales within {worst:.1e}"
    return GateResult(gate="integers", passed=True, figures=figures, limits={"scale_error": _HALF}, text=text)


Codes = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def _codes(tensors: Any, name: str, layer: Layer) -> Codes:
    """Codes (rows, columns), zero points and scales (rows, blocks)."""
    import torch

    from olive.quantization.packing import unpack

    packed, scales = tensors[f"{name}.qweight"], tensors[f"{name}.scales"].float()
    codes = unpack(packed, layer.bits, packed.shape[1] * 8 // layer.bits)
    if layer.symmetric:
        return codes, torch.full(scales.shape, layer.grid.middle, dtype=torch.uint8), scales
    return codes, unpack(tensors[f"{name}.qzeros"], layer.bits, scales.shape[1]), scales


def _hold(name: str, one: Codes, other: Codes, bits: tuple[int, int], where: str) -> float:
    """Compare one layer; returns the largest relative change of a scale."""
    import torch

    repeated = max(1, other[2].shape[1] // one[2].shape[1])
    zeros, scales = (value.repeat_interleave(repeated, 1) for value in one[1:])
    codes = one[0]
    if codes.shape == other[0].shape and bits[0] != bits[1]:  # the same steps on a wider grid
        shift = int(other[1].flatten()[0]) - int(zeros.flatten()[0])
        codes, zeros = codes + shift, zeros + shift
    zeros = torch.where(other[2] == 0, other[1], zeros) if zeros.shape == other[1].shape else zeros
    for what, wanted, found in (("integers", codes, other[0]), ("zero points", zeros, other[1])):
        if wanted.shape != found.shape or not torch.equal(wanted, found):
            raise PassFailed(
                f"integers gate: {name} has other {what} than it came from", where=where, fix=_FIX
            )
    if not bool(other[2].isfinite().all()):
        raise PassFailed(
            f"integers gate: {name} has scales that are NaN or infinite",
            where=where,
            fix="Set scale_dtype: float32 or bfloat16: a scale does not fit float16.",
        )
    moved = (other[2] - scales).abs()
    relative = float((moved / scales.abs().clamp(min=2.0**-14)).max())
    if relative > 2.0**-8:  # bfloat16
        raise PassFailed(f"integers gate: scales of {name} moved by {relative:.1e}", where=where, fix=_FIX)
    return relative


def _floats(before: Path, after: Path, where: str) -> int:
    """Compare what is in floating point in ``after``; returns how many tensors."""
    import torch

    count = 0
    with (
        DequantisedTensors(before, read_json(before / "config.json")) as ours,
        DequantisedTensors(after, read_json(after / "config.json")) as theirs,
    ):
        known = set(ours.names())
        for name in theirs.stored:
            if name.endswith((".qweight", ".scales", ".qzeros")):
                continue
            found = theirs.expanded(name)
            if name not in known or not torch.equal(found, ours.expanded(name).to(found.dtype)):
                raise PassFailed(f"integers gate: {name} differs from the source", where=where, fix=_FIX)
            count += 1
    return count
