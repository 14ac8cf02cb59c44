"""Quantisers that look at activations: the model runs layer by layer, on what the layers before now give."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.hardware.probe import matrix_rate
from olive.models.artifact import Artifact, ModelInfo
from olive.models.quantised import HEAD, Layer
from olive.models.stream import LazyTensors
from olive.passes.base import Cost, PassContext
from olive.passes.quantize import calibration, targets
from olive.passes.quantize.calibration import CalibrationParams
from olive.passes.quantize.quantiser import Quantiser, measure, read_weight, units_of
from olive.passes.quantize.shelf import Row, Shelf

if TYPE_CHECKING:
    import torch
    from torch import nn

    from olive.passes.quantize.forward import Group
    from olive.passes.quantize.layers import LayerStream
    from olive.passes.quantize.states import Ahead
    from olive.quantization.grid import Quantised
    from olive.quantization.hessian import Moments

P = TypeVar("P", bound=CalibrationParams)


@dataclass(slots=True)
class Made:
    """A quantised layer.

    Attributes:
        one: what is stored.
        facts: for the table; ``fallback`` among them where the layer's inputs were of no use.
        expanded: float32 (rows, columns), what it stands for on the inputs as they are now; None where that
            is what ``one`` stands for.
    """

    one: Quantised
    facts: dict[str, Any] = field(default_factory=dict)
    expanded: torch.Tensor | None = None


@dataclass(slots=True)
class Work:
    """A decoder layer in the making.

    Attributes:
        tensors: the original weights.
        chosen: layers to quantise, and how.
        device: where weights are computed on, ``cpu`` or ``gpu``.
        model_type: of the model's config.
        made: layers quantised so far.
        replaced: float32 tensors that are not quantised and change all the same, by name.
    """

    tensors: LazyTensors | Ahead
    chosen: Mapping[str, Layer]
    device: str
    model_type: str
    made: dict[str, tuple[Layer, Quantised]] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)


class Calibrated(Quantiser[P]):
    """Base of the quantisers with calibration. A method overrides ``solve``."""

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As every quantiser; there is data, and no experts."""
        yield from super().check(model, params, machine, accelerator)
        yield from calibration.check(params)
        if any(".experts." in name for name in model.tensors):
            yield Problem(
                "this model has experts, of which each sees few tokens; calibration does not know them",
                fix="Use KQuant, which leaves routers as they are.",
            )

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """Forward passes and second moments at the machine's matrix rate; hidden states of all tokens."""
        plain = super().estimate(model, params, machine, data)
        tokens = calibration.count(params, data)
        config = model.config
        hidden, inner = int(config.get("hidden_size", 1024)), int(config.get("intermediate_size", 4096))
        rate = matrix_rate(machine, "float32")
        flops = 2.0 * model.parameters * self.tokens_run(params, tokens, data)
        held = min(tokens, calibration.PER_BATCH) * (6 * hidden + 5 * inner) * 4 + tokens * hidden * 8
        return Cost(
            memory=plain.memory + held,
            disk=plain.disk,
            seconds=None if rate is None else 8 + flops / (0.6 * rate),
        )

    def tokens_run(self, params: P, tokens: int, data: Mapping[str, Preview]) -> float:
        """How many tokens' worth of forward passes it takes in all, moments counted as one."""
        return 3.0 * tokens

    def paired(self, params: P) -> int:
        """On how many tokens the unchanged model runs beside, at most."""
        return 0

    def layers(
        self,
        model: Artifact,
        info: ModelInfo,
        tensors: LazyTensors,
        chosen: Mapping[str, Layer],
        params: P,
        shelf: Shelf,
        ctx: PassContext,
    ) -> None:
        """Quantise the decoder layers in order, each on what those before it now give."""
        from olive.passes.quantize.layers import LayerStream

        rows = calibration.of(params, model, ctx)
        ctx.facts |= {"calibration_rows": len(rows.rows), "calibration_tokens": rows.tokens}
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        stream = LayerStream(model.path, tensors, rows, device, self.paired(params))
        units = units_of(chosen)
        ctx.progress.start("quantise", len(stream))
        for number in range(len(stream)):
            self._layer(stream, number, units.get(f"layer-{number}", []), chosen, params, shelf, ctx)
            ctx.progress.update(number + 1)
        ctx.progress.finish()
        if HEAD in chosen and not shelf.take("head"):
            began = time.perf_counter()
            weight = read_weight(tensors, HEAD, ctx.accelerator.device)
            moments = None if targets.tied(info) else stream.final_moments()
            one = self.quantise_head(weight, chosen[HEAD], moments)
            shelf.put(
                "head",
                {HEAD: (chosen[HEAD], one)},
                [measure(HEAD, chosen[HEAD], weight, one.dequantise(), began, moments)],
            )

    def _layer(
        self,
        stream: LayerStream,
        number: int,
        names: list[str],
        chosen: Mapping[str, Layer],
        params: P,
        shelf: Shelf,
        ctx: PassContext,
    ) -> None:
        with stream.layer(number) as layer:
            if not names or shelf.take(f"layer-{number}"):
                stream.restore(number, layer, names, shelf, chosen)
                return
            work = Work(stream.tensors, chosen, ctx.accelerator.device, stream.model_type)
            rows = self.one(stream, number, layer, params, work, ctx)
            for name in (name for name in names if name not in work.made):  # never called in the forward pass
                began = time.perf_counter()
                weight = read_weight(stream.tensors, name, work.device)
                one = self.quantise(weight, chosen[name], params)
                work.made[name] = chosen[name], one
                rows.append(measure(name, chosen[name], weight, one.dequantise(), began))
            shelf.put(f"layer-{number}", work.made, rows, work.replaced)

    def one(
        self, stream: LayerStream, number: int, layer: nn.Module, params: P, work: Work, ctx: PassContext
    ) -> list[Row]:
        """Quantise the linear layers of a decoder layer into ``work`` and go past it; what was measured."""
        rows: list[Row] = []

        def quantise(group: Group, modules: Mapping[str, nn.Linear]) -> None:
            wanted = [name for name in modules if name in work.chosen]
            for place, name in enumerate(wanted):
                module, how = modules[name], work.chosen[name]
                group.waiting = len(wanted) - place if group.closed else 0
                began = time.perf_counter()
                weight = read_weight(stream.tensors, name, work.device)
                made = self.solve(name, weight, how, group, params, work)
                work.made[name] = how, made.one
                expanded = made.one.dequantise() if made.expanded is None else made.expanded
                rows.append(measure(name, how, weight, expanded, began, group.moments, **made.facts))
                if "fallback" in made.facts:
                    ctx.progress.note(f"{name}: {made.facts['fallback']}; searched without its inputs")
                module.weight.data.copy_(expanded)

        stream.sweep(number, layer, quantise)
        return rows

    @abstractmethod
    def solve(
        self, name: str, weight: torch.Tensor, layer: Layer, group: Group, params: P, work: Work
    ) -> Made:
        """Quantise the (rows, columns) float32 weight of layer ``name``, which reads inputs of ``group``."""

    def quantise(self, weight: torch.Tensor, layer: Layer, params: P) -> Quantised:
        """Without inputs: the search, weighted by magnitude."""
        from olive.quantization.k_quant import magnitudes, search

        return search(weight, layer.grid, magnitudes(weight, layer.grid))

    def quantise_head(self, weight: torch.Tensor, layer: Layer, moments: Moments | None) -> Quantised:
        """A head that is also the embedding serves both: its errors count the same everywhere."""
        from olive.quantization.k_quant import search

        energy = None if moments is None or not moments.sound else moments.diagonal
        return search(weight, layer.grid, energy)
