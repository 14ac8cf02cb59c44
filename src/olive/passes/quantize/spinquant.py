"""SpinQuant: rotations learned by what the rounded model predicts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.hardware.probe import matrix_rate
from olive.models.artifact import Artifact, ModelInfo
from olive.models.quantised import Layer
from olive.passes.base import Cost, PassContext
from olive.passes.quantize import calibration, targets
from olive.passes.quantize.calibration import Calibration, DataParams
from olive.passes.quantize.quarot import RotateParams, Rotating
from olive.passes.quantize.targets import Bits

if TYPE_CHECKING:
    from olive.models.stream import LazyTensors
    from olive.passes.quantize.residual import Stream
    from olive.passes.quantize.rotated import Rotations

_HELD_OUT = 8  # one row of so many
_CHECKS = 8
_SHORTEST = 32  # tokens of a piece


class SpinQuant(Rotating["SpinQuant.Params"]):
    """Learn the rotations that leave the least distance between the model and its rounded form.

    Liu et al. 2024. It begins with QuaRot's, and what is best on rows held out is kept, the beginning
    included. The whole model is in memory in float32, three times.
    """

    class Params(RotateParams, DataParams):
        """What every rotating pass has, the rows, the grid to learn for, and the learning."""

        seed: int = Field(0, description="Of signs, random matrices, and the draw of rows.")
        bits: Bits = Field(4, description="Bits of a weight that the quantiser after it will use.")
        group_size: int = Field(32, description="Weights that share a scale there; -1 for a whole row.")
        sym: bool = Field(False, description="No zero points there.")
        iters: int = Field(32, ge=1, description="Steps, each on one batch.")
        lr: float = Field(
            0.05,
            gt=0,
            le=1,
            description="Largest angle of the first step, in radians; it falls to 0 linearly.",
        )
        batch_tokens: int = Field(512, ge=_SHORTEST, description="Tokens of a step; longer rows are cut.")

    hardware = ("device",)

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As every rotation; there is data, no experts, and blocks divide the rows."""
        yield from super().check(model, params, machine, accelerator)
        yield from calibration.check(params, "QuaRot")
        if any(".experts." in name for name in model.tensors):
            yield Problem(
                "this model has experts, of which each sees few tokens; rotations are not learned for them",
                fix="Use QuaRot.",
            )
        for name, layer in self._grids(model, params).items():
            columns = model.tensors[f"{name}.weight"][1][1]
            if layer.group_size != -1 and (layer.group_size < 2 or columns % layer.group_size):
                yield Problem(
                    f"rows of {name} have {columns} weights, which blocks of {layer.group_size} do not "
                    "divide",
                    where="group_size",
                    fix="Use the group_size of the quantiser that comes next.",
                )
                break

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """The model in float32 three times, logits and activations of a batch; the machine's matrix rate."""
        plain = super().estimate(model, params, machine, data)
        tokens = calibration.count(params, data)
        config = model.config
        vocabulary, hidden = int(config.get("vocab_size", 32_000)), int(config.get("hidden_size", 1024))
        rate = matrix_rate(machine, "float32")
        held = tokens / _HELD_OUT
        each = 6 * params.batch_tokens + 6 * hidden
        flops = model.parameters * (params.iters * each + _CHECKS * 2 * held + 2 * tokens)
        batch = params.batch_tokens * (
            10 * vocabulary + 40 * hidden * int(config.get("num_hidden_layers", 32))
        )
        return Cost(
            memory=max(plain.memory, (500 << 20) + 14 * model.parameters + 4 * batch),
            disk=plain.disk,
            seconds=None if rate is None or plain.seconds is None else plain.seconds + flops / (0.5 * rate),
        )

    def rotations(
        self, model: Artifact, tensors: LazyTensors, stream: Stream, params: Params, ctx: PassContext
    ) -> Rotations:
        """QuaRot's, moved as long as it helps on rows held out."""
        from olive.models.hf import describe, load_model
        from olive.passes.quantize.rotated import draw, folded
        from olive.passes.quantize.rotation_learning import RotatedNetwork, learn

        rows = calibration.of(params, model, ctx)
        train, held_out = _split(rows, params)
        grids = {
            f"{name}.weight": layer.grid for name, layer in self._grids(describe(model.path), params).items()
        }
        start = draw(stream, params.rotate_mode, params.seed)
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        weights = folded(tensors, stream)
        network = RotatedNetwork(
            load_model(model.path, dtype="float32", device=device), weights, stream, grids, start
        )
        del weights
        series = ctx.series.setdefault("rotation", [])

        def say(step: int, kl: float, unseen: float | None) -> None:
            series.append(
                {"step": float(step), "kl": kl} | ({} if unseen is None else {"held_out_kl": unseen})
            )
            ctx.progress.update(step, kl=kl)

        ctx.progress.start("learn rotations", params.iters)
        batches = train.batches(params.batch_tokens)
        random.Random(params.seed).shuffle(batches)  # noqa: S311 - a draw, no secret
        made, curve = learn(
            network,
            batches[: params.iters],
            held_out.batches(params.batch_tokens),
            steps=params.iters,
            rate=params.lr,
            checks=_CHECKS,
            say=say,
        )
        ctx.progress.finish()
        best = min(curve, key=lambda pair: pair[1])
        ctx.facts |= {
            "calibration_rows": len(rows.rows),
            "calibration_tokens": rows.tokens,
            "held_out_tokens": held_out.tokens,
            "loss_before": curve[0][1],
            "loss_after": best[1],
            "best_step": best[0],
        }
        return replace(made, notes=start.notes)

    def _grids(self, model: ModelInfo, params: Params) -> dict[str, Layer]:
        """The matrices of the decoder layers, and how they will be rounded."""
        return {
            name.removesuffix(".weight"): Layer(params.bits, params.group_size, params.sym)
            for name, (_, shape) in model.tensors.items()
            if name.endswith(".weight") and len(shape) == 2 and targets.number_of(name) is not None
        }


def _split(rows: Calibration, params: SpinQuant.Params) -> tuple[Calibration, Calibration]:
    """Pieces of the rows to learn on, and one in eight tokens held out."""
    longest = max(_SHORTEST, min(params.batch_tokens, rows.tokens // _HELD_OUT))
    pieces = [
        row[start : start + longest]
        for row in rows.rows
        for start in range(0, len(row), longest)
        if len(row) - start > 1
    ]
    count, tokens = 0, 0
    while tokens * _HELD_OUT < rows.tokens and count < len(pieces) - 1:
        tokens += len(pieces[count])
        count += 1
    return Calibration(tuple(pieces[count:])), Calibration(tuple(pieces[:count]))
