"""What every pass that quantises weights shares: layers, journal, measurements, the folder."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem
from olive.hardware.machine import Machine
from olive.hardware.products import choose_products
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import describe, open_model
from olive.models.quantised import EMBEDDING, HEAD, Layer
from olive.models.stream import LazyTensors
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.bits import PlannedBits, counted
from olive.passes.quantize import precision, targets
from olive.passes.quantize.shelf import Row, Shelf
from olive.passes.quantize.targets import QuantizeParams
from olive.passes.quantize.writer import write_folder

if TYPE_CHECKING:
    import torch

    from olive.passes.quantize.states import Ahead
    from olive.quantization.grid import Quantised
    from olive.quantization.hessian import Moments

P = TypeVar("P", bound=QuantizeParams)


class Quantiser(Pass[P]):
    """Base of the passes that store weights as integers, layer by layer.

    A method without data overrides ``quantise``; one with calibration derives from ``Calibrated``.
    """

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.HF,)
    produces: ClassVar[Kind] = Kind.HF
    libraries = ("torch", "safetensors", "transformers", "accelerate")
    gates = ("parity",)
    hardware = ("device", "execution_provider")
    makes_integers = True

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Layers, blocks, kernels of the target, head and embedding."""
        yield from targets.check(model, params, accelerator.execution_provider)

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """One layer in float32 and its copies; the parity gate runs the whole model in float32."""
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        return Cost(
            memory=(500 << 20) + 4 * model.parameters + 24 * largest,
            disk=stored_bytes(model, params),
            seconds=2.0 + model.parameters * self.seconds_each,
        )

    seconds_each: ClassVar[float] = 3e-8

    def bits(
        self, model: ModelInfo, params: P, target: Accelerator, before: PlannedBits | None
    ) -> PlannedBits | None:
        """By the document and by the choice before it; within its budget where that has to be measured."""
        from olive.passes.quantize.options import bytes_of

        choice = None if before is None else precision.overrides(before.choice)
        chosen = targets.chosen(model, params, choice)
        if not chosen:
            return None
        sizes = {name: bytes_of(model, name, layer) for name, layer in chosen.items()}
        total = stored_bytes(model, params, chosen)
        if before is None or before.choice:
            return PlannedBits(settings=counted(chosen, sizes), layers=len(chosen), bytes=total)
        same = before.layers == len(chosen) and not params.overrides and before.bytes is not None
        allowed = total - sum(sizes.values()) + before.bytes if same and before.bytes is not None else None
        return PlannedBits(layers=len(chosen), options=before.options, bytes=allowed, at_most=True)

    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Quantise ``model`` into ``ctx.out``.

        Raises:
            PassFailed: a weight is NaN or infinite.
        """
        import torch

        began = time.perf_counter()
        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
            choose_products(ctx.machine.cpu, ctx.machine.cpu_features)
        info = describe(model.path)
        chosen = targets.chosen(info, params)
        shelf = Shelf(ctx.journal, behind=ctx.accelerator.device != "cpu")
        with open_model(model.path)[0] as tensors, _tf32():
            try:
                self.layers(model, info, tensors, chosen, params, shelf, ctx)
            finally:
                shelf.close()
            size = write_folder(model.path, tensors, chosen, targets.default_settings(params), shelf, ctx.out)
        self._report(shelf, ctx, size, time.perf_counter() - began)

    def _report(self, shelf: Shelf, ctx: PassContext, size: int, seconds: float) -> None:
        ctx.attributes["precision"] = f"int{min(row['bits'] for row in shelf.rows)}"
        ctx.facts |= {
            "method": type(self).__name__,
            "layers": shelf.rows,
            "layers_from_journal": shelf.resumed,
            "bytes": size,
            "seconds": round(seconds, 3),
            "fallbacks": sum("fallback" in row for row in shelf.rows),
        }
        ctx.series["quantisation"] = [
            {"step": float(number), "weight_error": row["weight_error"]}
            | ({"output_error": row["output_error"]} if "output_error" in row else {})
            for number, row in enumerate(shelf.rows)
        ]

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
        """Quantise every chosen layer onto the shelf; here without data, unit by unit."""
        units = units_of(chosen)
        ctx.progress.start("quantise", len(units))
        for done, (unit, names) in enumerate(units.items(), 1):
            if not shelf.take(unit):
                made, rows = {}, []
                for name in names:
                    began = time.perf_counter()
                    weight = read_weight(tensors, name, ctx.accelerator.device)
                    one = self.quantise(weight, chosen[name], params)
                    made[name] = chosen[name], one
                    rows.append(measure(name, chosen[name], weight, one.dequantise(), began))
                shelf.put(unit, made, rows)
            ctx.progress.update(done)
        ctx.progress.finish()

    @abstractmethod
    def quantise(self, weight: torch.Tensor, layer: Layer, params: P) -> Quantised:
        """Quantise one (rows, columns) float32 matrix without data."""


@contextmanager
def _tf32() -> Iterator[None]:
    """A GPU's products in TF32: of activations that are 16 bits, and of errors. Gates run without it."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def units_of(chosen: Mapping[str, Layer]) -> dict[str, list[str]]:
    """Unit -> its layers: what is journalled together."""
    units: dict[str, list[str]] = {}
    for name in chosen:
        number = targets.number_of(name)
        units.setdefault("head" if number is None else f"layer-{number}", []).append(name)
    return units


def read_weight(tensors: LazyTensors | Ahead, name: str, device: str) -> torch.Tensor:
    """The (rows, columns) float32 weight of a layer; of a head that has none, the embedding.

    Raises:
        PassFailed: it has NaN or infinity.
    """
    import torch

    key = f"{name}.weight"
    if key not in tensors and name == HEAD:
        key = f"{EMBEDDING}.weight"
    weight = tensors[key].to("cpu" if device == "cpu" else "cuda", torch.float32)
    if not bool(torch.stack(weight.aminmax()).isfinite().all()):  # one pass; NaN is passed on
        bad = int((~weight.isfinite()).sum())
        raise PassFailed(
            f"{key} has {bad} values that are NaN or infinite",
            fix="Look at what made this model; of a fine-tuning, lower the learning rate.",
        )
    return weight


def measure(
    name: str,
    layer: Layer,
    weight: torch.Tensor,
    expanded: torch.Tensor,
    began: float,
    moments: Moments | None = None,
    **more: Any,
) -> Row:
    """What the report says of a layer; ``expanded`` is what its integers stand for."""
    from olive.quantization.errors import output_error, weight_error

    row: Row = {
        "name": name,
        "bits": layer.bits,
        "group_size": layer.group_size,
        "weight_error": weight_error(weight, expanded),
    }
    if moments is not None and moments.sound:
        row["output_error"] = output_error(weight, expanded, moments.sums)
    return row | {"seconds": round(time.perf_counter() - began, 4)} | more


def stored_bytes(model: ModelInfo, params: QuantizeParams, chosen: Mapping[str, Layer] | None = None) -> int:
    """Bytes of the tensors that will be written; ``chosen`` is how, by default as beside the model."""
    chosen = targets.chosen(model, params) if chosen is None else chosen
    total = 0
    for name, (code, shape) in model.tensors.items():
        layer = name.removesuffix(".weight")
        if HEAD in chosen and name == f"{EMBEDDING}.weight" and targets.tied(model):
            layer = HEAD
        if layer in chosen and len(shape) == 2:
            rows, columns = shape
            kind, blocks = chosen[layer], chosen[layer].block_count(columns)
            each = columns * kind.bits // 8 + 4 * blocks
            total += rows * (each + (0 if kind.symmetric else -(-blocks * kind.bits // 8)))
        else:
            total += prod(shape) * {"F64": 8, "F32": 4, "I64": 8, "I32": 4}.get(code, 2)
    return total
