"""Which layers get how many bits, by rule or by what each costs the model's predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import AliasChoices, Field

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import describe
from olive.models.quantised import EMBEDDING, HEAD, Layer
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.quantize import calibration, precision, targets
from olive.passes.quantize.calibration import CalibrationParams
from olive.passes.quantize.targets import Bits, Override

if TYPE_CHECKING:
    import torch

_SCORED = ("snr", "snr_relative", "iqe", "iqe_relative", "kld_gradient")


class SelectiveMixedPrecision(Pass["SelectiveMixedPrecision.Params"]):
    """Give the layers that need them more bits, and leave the choice to the quantiser that comes next.

    The model itself is unchanged; the choice travels in a file beside it.
    """

    class Params(CalibrationParams):
        """The rule or the budget, and the two settings to choose from."""

        algorithm: Literal[
            "kl", "k_quant_last", "k_quant_down", "k_quant_mixed",
            "snr", "snr_relative", "iqe", "iqe_relative", "kld_gradient",
        ] = Field("kl", description="Measured by the predictions, or a named rule.")  # fmt: skip
        high_bits: Bits = Field(8, description="Bits of a weight where more are given.")
        high_group_size: int | None = Field(
            None, description="Weights that share a scale there. Default: group_size."
        )
        high_sym: bool | None = Field(None, description="No zero points there. Default: sym.")
        ratio: float | None = Field(
            None, gt=0, lt=1, description="Budget: share of the weights that would stay at `bits`."
        )
        size: float | None = Field(
            None,
            gt=0,
            description="Budget of the quantised matrices: bytes, or up to 1 the share of their 16-bit size.",
        )
        bits_per_weight: float | None = Field(
            None, gt=0, description="Budget: bits of a weight, with its share of scales and zero points."
        )
        calibration_tokens: int = Field(
            4096,
            ge=calibration.MINIMUM,
            validation_alias=AliasChoices("calibration_tokens", "tokens"),
            description="Tokens that the sensitivity is measured on.",
        )
        kld_memory_mode: str = Field("auto", description="Accepted from Olive 0.13; without effect.")

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.HF,)
    produces: ClassVar[Kind] = Kind.HF
    libraries = ("torch", "safetensors", "transformers", "accelerate")
    hardware = ("device", "execution_provider")

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Both settings fit layers and kernels; one budget, which can be met; data to measure on."""
        for each in (params, _high(params)):
            yield from targets.check(model, each, accelerator.execution_provider)
        budgets = [name for name in ("ratio", "size", "bits_per_weight") if getattr(params, name) is not None]
        if params.algorithm.startswith("k_quant"):
            if budgets:
                yield Problem(
                    f"{params.algorithm} is a rule, which {budgets[0]} cannot change",
                    where=budgets[0],
                    fix="Set algorithm: kl to choose by a budget.",
                )
            return
        yield from calibration.check(params)
        if len(budgets) != 1:
            yield Problem(
                f"algorithm {params.algorithm} takes one budget, and there are {len(budgets)}",
                fix="Set one of size, bits_per_weight and ratio.",
            )
        else:
            least = sum(
                min(_bytes(model, name, layer) for layer in both) for name, both in _both(model, params)
            )
            allowed = _budget(model, params)
            if least > allowed:
                yield Problem(
                    f"{budgets[0]} allows {allowed:,} bytes, and at {params.bits} bits there are {least:,}",
                    where=budgets[0],
                    fix="Allow more, or set fewer bits or a larger group_size.",
                )
        if params.algorithm in _SCORED:
            yield Problem(
                f"{params.algorithm} is measured as kl: by the predictions, and the budget is met exactly",
                where="algorithm",
                severity=Severity.NOTE,
            )

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """The model in float32, both changes of it in bfloat16, activations of one batch; a copied folder."""
        size = sum(
            prod(shape) * (4 if code in ("F32", "I32") else 2) for code, shape in model.tensors.values()
        )
        if params.algorithm.startswith("k_quant"):
            return Cost(memory=100 << 20, disk=size, seconds=1.0)
        tokens = calibration.count(params, data)
        return Cost(
            memory=(800 << 20)
            + 8 * model.parameters
            + _BATCH * 64 * int(model.config.get("hidden_size", 1024)) * 4,
            disk=size,
            seconds=5.0 + model.parameters * (1e-7 + 3e-10 * tokens),
        )

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Copy the model and write the choice beside it.

        Raises:
            PassFailed: the budget cannot be met.
        """
        from olive.store.copying import copy_file

        info = describe(model.path)
        pairs = dict(_both(info, params))
        if params.algorithm.startswith("k_quant"):
            rich = precision.preset(params.algorithm, pairs, int(info.config["num_hidden_layers"]))
            rows: list[dict[str, Any]] = []
        else:
            rich, rows = self._measured(model, info, params, pairs, ctx)
        for path in sorted(model.path.rglob("*")):
            if path.is_file():
                target = ctx.out / path.relative_to(model.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, target)
        choice = {name: pair[name in rich] for name, pair in pairs.items()}
        precision.write(
            ctx.out,
            {
                name: Override(bits=one.bits, group_size=one.group_size, symmetric=one.symmetric)
                for name, one in choice.items()
            },
        )
        size = sum(_bytes(info, name, layer) for name, layer in choice.items())
        weights = sum(_weights(info, name) for name in choice)
        ctx.facts |= {
            "method": params.algorithm,
            "high": sorted(rich & set(choice)),
            "bytes": size,
            "bits_per_weight": round(8 * size / weights, 4),
            "sensitivity": rows,
        }

    def _measured(
        self,
        model: Artifact,
        info: ModelInfo,
        params: Params,
        pairs: Mapping[str, tuple[Layer, Layer]],
        ctx: PassContext,
    ) -> tuple[set[str], list[dict[str, Any]]]:
        from olive.quantization.knapsack import choose

        losses = self._losses(model, params, pairs, ctx)
        units = units_of(pairs)
        options = [
            [
                (
                    sum(_bytes(info, name, pairs[name][high]) for name in unit),
                    sum(losses[name][high] for name in unit),
                )
                for high in (0, 1)
            ]
            for unit in units
        ]
        taken = choose(options, _budget(info, params))
        if taken is None:
            raise PassFailed("the budget is below what all layers take at the least", fix="Allow more.")
        rich = {name for unit, high in zip(units, taken, strict=True) if high for name in unit}
        rows = [
            {"names": list(unit), "kl": [loss for _, loss in each]}
            for unit, each in zip(units, options, strict=True)
        ]
        return rich, rows

    def _losses(
        self,
        model: Artifact,
        params: Params,
        pairs: Mapping[str, tuple[Layer, Layer]],
        ctx: PassContext,
    ) -> dict[str, list[float]]:
        """Estimated KL of each layer at either setting."""
        import torch

        from olive.models.hf import load_model
        from olive.quantization.k_quant import magnitudes, search
        from olive.quantization.sensitivity import expected_kl

        rows = calibration.read(
            ctx.data[params.data_config or ""],
            model.path,
            ctx.base_dir,
            params.calibration_tokens,
            params.seed,
        )
        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        network = load_model(model.path, dtype="float32").to(device).requires_grad_(False).eval()
        changes: dict[str, list[torch.Tensor]] = {}
        ctx.progress.start("sensitivity", len(pairs))
        for done, (name, pair) in enumerate(pairs.items(), 1):
            weight = network.get_submodule(name).weight.data
            found = [search(weight, one.grid, magnitudes(weight, one.grid)).dequantise() for one in pair]
            changes[name] = [(one - weight).bfloat16() for one in found]
            ctx.progress.update(done)
        ctx.progress.finish()
        return expected_kl(network, rows.batches(_BATCH), changes, params.seed)


_BATCH = 1024  # tokens whose activations are held for the backward pass


def units_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that must share their settings together, since the export packs them into one matrix."""
    units: dict[str, list[str]] = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        shared = next((key[0] for key in targets.SHARED if last in key), None)
        units.setdefault(name if shared is None else f"{prefix}.{shared}", []).append(name)
    return [tuple(unit) for unit in units.values()]


def _high(params: SelectiveMixedPrecision.Params) -> SelectiveMixedPrecision.Params:
    sym = params.sym if params.high_sym is None else params.high_sym
    group = params.high_group_size or params.group_size
    return params.model_copy(update={"bits": params.high_bits, "group_size": group, "sym": sym})


def _both(
    info: ModelInfo, params: SelectiveMixedPrecision.Params
) -> Iterable[tuple[str, tuple[Layer, Layer]]]:
    plain = info.model_copy(update={"path": info.path / "-"})  # an earlier choice does not bind a new one
    high = targets.chosen(plain, _high(params))
    for name, low in targets.chosen(plain, params).items():
        yield name, (low, high[name])


def _shape(info: ModelInfo, name: str) -> tuple[int, ...]:
    key = f"{name}.weight"
    if name == HEAD and key not in info.tensors:
        key = f"{EMBEDDING}.weight"
    return info.tensors[key][1]


def _weights(info: ModelInfo, name: str) -> int:
    return prod(_shape(info, name))


def _bytes(info: ModelInfo, name: str, layer: Layer) -> int:
    """Stored bytes of a layer: integers, scales of float32, packed zero points."""
    rows, columns = _shape(info, name)
    blocks = layer.block_count(columns)
    zeros = 0 if layer.symmetric else -(-blocks * layer.bits // 8)
    return rows * (columns * layer.bits // 8 + 4 * blocks + zeros)


def _budget(info: ModelInfo, params: SelectiveMixedPrecision.Params) -> int:
    pairs = dict(_both(info, params))
    weights = sum(_weights(info, name) for name in pairs)
    if params.size is not None:
        return int(params.size * 2 * weights if params.size <= 1 else params.size)
    if params.bits_per_weight is not None:
        return int(params.bits_per_weight * weights / 8)
    low, high = (sum(_bytes(info, name, pair[place]) for name, pair in pairs.items()) for place in (0, 1))
    ratio = params.ratio if params.ratio is not None else 1.0
    return int(ratio * low + (1 - ratio) * high)
