"""Write a model of integers in the format of another tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem
from olive.hardware.machine import Machine
from olive.hardware.probe import installed
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import finish_folder, open_model, read_json
from olive.models.quantised import EMBEDDING, HEAD, Layer, expand, layer_of
from olive.models.stream import Layout, LazyTensors, write
from olive.models.tensors import INDEX
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.save import formats
from olive.passes.save.formats import SCALES, Format, Matrix

if TYPE_CHECKING:
    import torch

_WHERE = "SaveQuantized"
_PARTS = (".qweight", ".scales", ".qzeros")


class SaveQuantized(Pass["SaveQuantized.Params"]):
    """The same integers in a Hugging Face folder that other tools load: GPTQ, AWQ or compressed-tensors."""

    class Params(PassParams):
        """Format, and the dtype of scales."""

        format: Format = Field(
            description="gptq (zero points less 1, as AutoGPTQ wrote them), gptq_v2 (zero points as they "
            "are), awq (gemm, 4 bits), or compressed-tensors (pack-quantized)."
        )
        scale_dtype: Literal["float16", "bfloat16", "float32"] = Field(
            "float16", description="Dtype of the scales; the kernels of other tools expect float16."
        )

    accepts, produces = (Kind.HF,), Kind.HF
    libraries = ("torch", "safetensors")
    gates = ("integers", "parity")
    makes_integers = reads_integers = needs_integers = True

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Layers that have no place in the format, of an input model that is stored as integers."""
        for one in matrices(model.tensors, model.config, SCALES[params.scale_dtype]).values():
            reason = next(formats.problems(params.format, one.layer), None) or formats.misfit(
                params.format, one
            )
            if reason:
                yield Problem(f"{one.name}: {reason}", "format", "Use another format.")
                return

    def check_integers(self, params: Params) -> Iterable[Problem]:
        """Integers are what it is for."""
        return ()

    def check_settings(self, params: Params, quantiser: PassParams) -> Iterable[Problem]:
        """Settings of the pass before it that the format cannot store."""
        bits = getattr(quantiser, "bits", None)
        if bits is None:
            return
        default = Layer(bits, getattr(quantiser, "group_size", 32), getattr(quantiser, "sym", False))
        found = {default}
        for pattern, other in getattr(quantiser, "overrides", {}).items():
            if params.format == "awq" and pattern == HEAD:
                continue  # stored in floating point
            found.add(
                Layer(
                    getattr(other, "bits", None) or default.bits,
                    getattr(other, "group_size", None) or default.group_size,
                    default.symmetric,
                )
            )
        for layer in found:
            for reason in formats.problems(params.format, layer):
                yield Problem(f"{reason}, which the pass before it makes", "format", "Use another format.")
        if params.format == "awq" and len({layer.group_size for layer in found}) > 1:
            yield Problem("awq has one group_size for all layers", "format", "Use compressed-tensors.")

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """One tensor in memory; the parity gate runs the whole model in float32."""
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        return Cost(
            memory=(500 << 20) + 4 * model.parameters + 8 * largest,
            disk=model.parameters,
            seconds=1.0 + model.parameters * 1e-8,
        )

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the folder, one tensor in memory at a time.

        Raises:
            PassFailed: the model has no integers, or a layer has no place in the format.
        """
        tensors, config = open_model(model.path)
        found = matrices(tensors.layout, config, SCALES[params.scale_dtype])
        if not found:
            raise PassFailed("the model holds no integers", where=_WHERE, fix="Quantise it first.")
        chosen = {name: one for name, one in found.items() if not _stays_float(name, params.format, tensors)}
        for one in chosen.values():
            reason = next(formats.problems(params.format, one.layer), None)
            if reason := reason or formats.misfit(params.format, one):
                raise PassFailed(f"{one.name}: {reason}", where=_WHERE, fix="Use another format.")
        if params.format == "awq" and len({one.layer.group_size for one in chosen.values()}) > 1:
            raise PassFailed("awq has one group_size for all layers", where=_WHERE, fix="Use another format.")
        with tensors:
            saver = _Saver(tensors, found, chosen, params.format, config)
            ctx.progress.start(f"save as {params.format}", len(tensors))
            saver.write(ctx)
            ctx.progress.finish()
        self._finish(model, params, config, saver, ctx)

    def _finish(
        self, model: Artifact, params: Params, config: Mapping[str, Any], saver: _Saver, ctx: PassContext
    ) -> None:
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        (ctx.out / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        finish_folder(ctx.out, model.path)
        body = read_json(ctx.out / "config.json")
        layers = {name: one.layer for name, one in saver.chosen.items()}
        body["quantization_config"] = formats.config(
            params.format, layers, saver.floats(), head=HEAD in layers, version=installed("olive-next") or ""
        )
        text = json.dumps(body, indent=2, sort_keys=True) + "\n"
        (ctx.out / "config.json").write_text(text, encoding="utf-8")
        ctx.attributes["precision"] = f"int{min(layer.bits for layer in layers.values())}"
        ctx.facts |= {
            "method": _WHERE,
            "format": params.format,
            "layers_stored": len(layers),
            "bytes": saver.bytes,
            "expanded": sorted(saver.found.keys() - saver.chosen.keys()),
            "zero_points_of_zero": saver.wrapped,
        }
        if saver.wrapped and params.format == "gptq":
            ctx.progress.note(
                f"{saver.wrapped} zero points are 0, stored as all ones: readers that do not wrap around "
                "read one more than the highest code. Use gptq_v2 for those."
            )


def matrices(
    tensors: Mapping[str, Layout], config: Mapping[str, Any], scale: str = "F32"
) -> dict[str, Matrix]:
    """Every layer of integers, by headers in our layout."""
    found = {}
    for name, (_, shape) in tensors.items():
        if name.endswith(".qweight"):
            layer = layer_of(config, name.removesuffix(".qweight"))
            one = Matrix(name.removesuffix(".qweight"), layer, shape[0], shape[1] * 8 // layer.bits, scale)
            found[one.name] = one
    return found


def _stays_float(name: str, form: Format, tensors: LazyTensors) -> bool:
    """A head that others do not read as integers: one that is the embedding too, and any in AWQ."""
    return name == HEAD and (form == "awq" or f"{EMBEDDING}.weight" not in tensors)


class _Saver:
    """Gives each tensor of the result.

    Attributes:
        found: layers of integers of the source.
        chosen: those that stay integers.
        bytes: written.
        wrapped: zero points that are 0.
    """

    def __init__(
        self,
        tensors: LazyTensors,
        found: Mapping[str, Matrix],
        chosen: Mapping[str, Matrix],
        form: Format,
        config: Mapping[str, Any],
    ) -> None:
        self.tensors, self.found, self.chosen, self.form = tensors, found, chosen, form
        self.tied = HEAD in found and f"{EMBEDDING}.weight" not in tensors
        self.bytes = self.wrapped = 0
        self._kept: list[str] = []

    def write(self, ctx: PassContext) -> None:
        """Write the files of the source, with their names."""
        table: dict[str, str] = {}
        for file, names in self.tensors.by_file.items():
            made: dict[str, tuple[Layout, Callable[..., torch.Tensor]]] = {}
            for name in names:
                made |= self._tensors(name)

            def load(name: str, made: Mapping[str, Any] = made) -> torch.Tensor:
                ctx.progress.update(len(table))
                return made[name][1](self.tensors.__getitem__)

            self.bytes += write(ctx.out / file, {name: part[0] for name, part in made.items()}, load)
            table.update(dict.fromkeys(made, file))
        if len(self.tensors.by_file) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": table}
            (ctx.out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._kept = list(table)
        self.wrapped = sum(self._zero_points_of_zero(one) for one in self.chosen.values())

    def floats(self) -> list[str]:
        """Linear layers in floating point: weight matrices that are no embedding."""
        shapes = {name: self.tensors.layout.get(name) for name in self._kept}
        linear = [
            name.removesuffix(".weight")
            for name, layout in shapes.items()
            if name.endswith(".weight") and (layout is None or len(layout[1]) == 2) and "embed" not in name
        ]
        return sorted({*linear, *([HEAD] if HEAD not in self.chosen else [])})

    def _tensors(self, name: str) -> dict[str, tuple[Layout, Callable[..., torch.Tensor]]]:
        layer = name.rpartition(".")[0]
        if layer not in self.found or not name.endswith(_PARTS):
            return {name: (self.tensors.layout[name], lambda load: load(name))}
        if not name.endswith(".qweight"):
            return {}  # made with the codes
        one = self.found[layer]
        if layer in self.chosen:
            return dict(formats.tensors(self.form, one))
        target = EMBEDDING if self.tied else layer
        return {f"{target}.weight": (("F32", (one.rows, one.columns)), lambda load: _expanded(one, load))}

    def _zero_points_of_zero(self, one: Matrix) -> int:
        if one.layer.symmetric:
            return 0
        return int((one.zeros(self.tensors.__getitem__) == 0).sum())


def _expanded(one: Matrix, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    zeros = None if one.layer.symmetric else load(f"{one.name}.qzeros")
    return expand(one.layer, load(f"{one.name}.qweight"), load(f"{one.name}.scales"), zeros, one.columns)
