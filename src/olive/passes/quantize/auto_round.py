"""AutoRound: roundings of a decoder layer learned together, by what the layer puts out."""

from __future__ import annotations

import copy
import sys
import time
from typing import TYPE_CHECKING, Literal

from pydantic import AliasChoices, Field

from olive.models.quantised import Layer
from olive.passes.base import PassContext
from olive.passes.quantize.calibrated import Calibrated, Made, Work
from olive.passes.quantize.calibration import CalibrationParams
from olive.passes.quantize.quantiser import measure, read_weight
from olive.passes.quantize.shelf import Row

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from olive.data.plan import Preview
    from olive.passes.quantize.forward import Group
    from olive.passes.quantize.layers import LayerStream
    from olive.quantization.grid import Quantised

_STEPS = {"light": 50, "default": 200, "best": 1000}


class AutoRound(Calibrated["AutoRound.Params"]):
    """Learn which way each weight is rounded, and how far each block reaches (Cheng et al. 2023).

    For each decoder layer the offsets of all its linear layers are learned together, so that its output comes
    near that of the unchanged model. Signed gradient steps; the step size falls to 0 linearly.
    """

    class Params(CalibrationParams):
        """Settings of every calibrated quantiser, and of the learning."""

        preset: Literal["light", "default", "best"] = Field(
            "default", description="Steps for each decoder layer: 50, 200 or 1000."
        )
        iters: int | None = Field(
            None, ge=1, description="Steps for each decoder layer, in place of the preset's."
        )
        batch_size: int = Field(8, ge=1, description="Calibration rows of a step.")
        lr: float | None = Field(
            None,
            gt=0,
            validation_alias=AliasChoices("lr", "learning_rate"),
            description="Size of the first step of an offset. Default: 1 / steps.",
        )
        minmax_lr: float | None = Field(
            None, gt=0, description="Size of the first step of a block's factors. Default: as lr."
        )
        enable_minmax_tuning: bool = Field(
            True, description="Learn how far a block reaches, besides the rounding."
        )
        enable_quanted_input: bool = Field(
            True,
            description="A layer learns on what the quantised layers before it give; false: on what the "
            "unchanged ones give.",
        )
        start: Literal["extremes", "search"] = Field(
            "extremes",
            description="Where blocks start: at their extremes, as published, or at the scales that KQuant's "
            "search finds with the inputs' energy.",
        )

    def paired(self, params: Params) -> int:
        """The aim is what the unchanged model puts out, for every token."""
        return sys.maxsize

    def solve(
        self, name: str, weight: torch.Tensor, layer: Layer, group: Group, params: Params, work: Work
    ) -> Made:
        """Where a searched start begins: the search weighted by the inputs' energy."""
        from olive.quantization.k_quant import search

        if not group.moments.sound:
            return Made(self.quantise(weight, layer, params))
        energy = group.moments.diagonal
        return Made(search(weight, layer.grid, energy / energy.mean()))

    def tokens_run(self, params: Params, tokens: int, data: Mapping[str, Preview]) -> float:
        """A step is a forward and a backward pass of some rows; and what every calibration takes."""
        found = data.get(params.data_config or "")
        row = found.tokens / found.blocks if found is not None and found.blocks else 512
        steps = params.iters or _STEPS[params.preset]
        return 5.0 * tokens + 3.0 * steps * min(params.batch_size * row, tokens)

    def one(
        self,
        stream: LayerStream,
        number: int,
        layer: nn.Module,
        params: Params,
        work: Work,
        ctx: PassContext,
    ) -> list[Row]:
        """Learn the roundings of all linear layers together."""
        from torch import nn

        from olive.passes.quantize.layers import leave
        from olive.passes.quantize.learning import learn
        from olive.quantization.rounding import LearnedRounding

        began = time.perf_counter()
        original = copy.deepcopy(layer)
        prefix = f"{stream.prefix}.{number}."
        linears = {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and prefix + name in work.chosen
        }
        weights = {name: read_weight(stream.tensors, prefix + name, work.device) for name in linears}
        starts = self._starts(stream, number, layer, params, work) if params.start == "search" else {}
        roundings = {
            f"{name}.weight": LearnedRounding(
                weight,
                work.chosen[prefix + name].grid,
                starts.get(prefix + name),
                params.enable_minmax_tuning,
            )
            for name, weight in weights.items()
        }
        steps = params.iters or _STEPS[params.preset]
        rate = params.lr or 1 / steps
        before, after = learn(
            stream,
            number,
            layer,
            original,
            roundings,
            steps=steps,
            rates=(rate, params.minmax_lr or rate),
            batch=params.batch_size,
            seed=params.seed,
            quantised_input=params.enable_quanted_input,
        )
        rows: list[Row] = []
        for name, module in linears.items():
            one, full = roundings[f"{name}.weight"].quantised(), prefix + name
            work.made[full] = work.chosen[full], one
            expanded = one.dequantise()
            module.weight.data.copy_(expanded)
            row = measure(full, work.chosen[full], weights[name], expanded, began)
            rows.append(row | {"loss_before": before, "loss_after": after})
            began = time.perf_counter()
        stream.advance(number, layer, original)
        leave(original)
        return rows

    def _starts(
        self, stream: LayerStream, number: int, layer: nn.Module, params: Params, work: Work
    ) -> dict[str, Quantised]:
        """Searched scales of every linear layer; the layer and the hidden states stay as they are."""
        found: dict[str, Quantised] = {}
        now, before = stream.now.copy(), stream.before.copy()
        kept = {name: value.clone() for name, value in layer.state_dict().items()}

        def take(group: Group, modules: Mapping[str, torch.nn.Linear]) -> None:
            for name, module in modules.items():
                if name in work.chosen:
                    weight = module.weight.detach()
                    found[name] = self.solve(name, weight, work.chosen[name], group, params, work).one

        stream.sweep(number, layer, take)
        layer.load_state_dict(kept)
        stream.now, stream.before = now, before
        return found
