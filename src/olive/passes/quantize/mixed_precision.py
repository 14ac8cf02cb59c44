"""Which layers get how many bits, by rule or by what each costs the model's predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field

from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import describe
from olive.models.quantised import Layer
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.bits import PlannedBits, counted
from olive.passes.quantize import calibration, precision, targets
from olive.passes.quantize.calibration import CalibrationParams
from olive.passes.quantize.options import (
    budget_of,
    bytes_of,
    choose_within,
    high_params,
    options_of,
    units_of,
    weights_of,
)
from olive.passes.quantize.targets import Bits

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
        group_sizes: tuple[int, ...] | None = Field(
            None,
            description="Blocks that kl may also choose, at bits and at high_bits. Default: 16, 32, 64 and "
            "128 where the target's kernels were verified; [] for none.",
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
        more = [params.model_copy(update={"group_size": group}) for group in params.group_sizes or ()]
        for each in (params, high_params(params), *more):
            yield from targets.check(model, each, accelerator.execution_provider)
        if params.fallback:
            yield Problem(
                "this pass makes no integers that a gate could refuse",
                where="fallback",
                fix="Set it on the quantiser that comes next.",
            )
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
            options = options_of(model, params, accelerator.execution_provider)
            least = sum(min(bytes_of(model, name, layer) for layer in many) for name, many in options.items())
            allowed = budget_of(model, params, options)
            if least > allowed:
                yield Problem(
                    f"{budgets[0]} allows {allowed:,} bytes, and at {params.bits} bits there are {least:,}",
                    where=budgets[0],
                    fix="Allow more, or set fewer bits or a larger group_size.",
                )
        if params.algorithm in _SCORED:
            yield Problem(
                f"{params.algorithm} is measured as kl: by the predictions",
                where="algorithm",
                severity=Severity.NOTE,
            )

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """The model in float32, a change of it in bfloat16, activations of one batch; a copied folder."""
        size = sum(
            prod(shape) * (4 if code in ("F32", "I32") else 2) for code, shape in model.tensors.values()
        )
        if params.algorithm.startswith("k_quant"):
            return Cost(memory=100 << 20, disk=size, seconds=1.0)
        tokens = calibration.count(params, data)
        return Cost(
            memory=(800 << 20)
            + 7 * model.parameters
            + _BATCH * 64 * int(model.config.get("hidden_size", 1024)) * 4,
            disk=size,
            seconds=5.0 + model.parameters * (2e-7 + 6e-10 * tokens),
        )

    def bits(
        self, model: ModelInfo, params: Params, target: Accelerator, before: PlannedBits | None
    ) -> PlannedBits | None:
        """What a rule chooses; of a budget, its bytes and how many settings there are to choose from."""
        options = options_of(model, params, target.execution_provider)
        if not params.algorithm.startswith("k_quant"):
            return PlannedBits(
                layers=len(options),
                options=max(map(len, options.values()), default=0),
                bytes=budget_of(model, params, options),
                at_most=True,
                chooses=True,
            )
        choice = _by_rule(model, params, options)
        sizes = {name: bytes_of(model, name, layer) for name, layer in choice.items()}
        return PlannedBits(
            settings=counted(choice, sizes),
            layers=len(choice),
            bytes=sum(sizes.values()),
            chooses=True,
            choice=choice,
        )

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Copy the model and write the choice beside it.

        Raises:
            PassFailed: the budget cannot be met.
        """
        from olive.store.copying import copy_file

        info = describe(model.path)
        options = options_of(info, params, ctx.target.execution_provider)
        if params.algorithm.startswith("k_quant"):
            choice = _by_rule(info, params, options)
        else:
            choice = self._measured(model, info, params, options, ctx)
        for path in sorted(model.path.rglob("*")):
            if path.is_file():
                target = ctx.out / path.relative_to(model.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(path, target)
        precision.write(ctx.out, precision.overrides(choice))
        size = sum(bytes_of(info, name, layer) for name, layer in choice.items())
        weights = sum(weights_of(info, name) for name in choice)
        ctx.facts |= {
            "method": params.algorithm,
            "high": [name for name, one in choice.items() if one.bits == params.high_bits > params.bits],
            "bytes": size,
            "bits_per_weight": round(8 * size / weights, 4),
            "settings": dict(
                Counter(f"{one.bits} bits in blocks of {one.group_size}" for one in choice.values())
            ),
        }

    def _measured(
        self,
        model: Artifact,
        info: ModelInfo,
        params: Params,
        options: Mapping[str, tuple[Layer, ...]],
        ctx: PassContext,
    ) -> dict[str, Layer]:
        """The settings of least KL in sum within the budget."""
        losses = self._losses(model, params, options, ctx)
        units = units_of(options)
        items = [
            [
                (
                    sum(bytes_of(info, name, options[name][number]) for name in unit),
                    sum(losses[name][number] for name in unit),
                )
                for number in range(len(options[unit[0]]))
            ]
            for unit in units
        ]
        taken = choose_within(items, budget_of(info, params, options))
        if taken is None:
            raise PassFailed("the budget is below what all layers take at the least", fix="Allow more.")
        ctx.facts["expected_kl"] = sum(item[number][1] for item, number in zip(items, taken, strict=True))
        ctx.facts["sensitivity"] = [
            {"names": list(unit), "kl": [loss for _, loss in item]}
            for unit, item in zip(units, items, strict=True)
        ]
        found = {
            name: options[name][number] for unit, number in zip(units, taken, strict=True) for name in unit
        }
        return {name: found[name] for name in options}

    def _losses(
        self,
        model: Artifact,
        params: Params,
        options: Mapping[str, tuple[Layer, ...]],
        ctx: PassContext,
    ) -> dict[str, list[float]]:
        """KL of each layer at each setting."""
        import torch

        from olive.models.hf import load_model
        from olive.passes.quantize.divergence import Subject, losses

        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        subject = Subject(
            lambda: load_model(model.path, dtype="float32").to(device).requires_grad_(False).eval(),
            lambda: calibration.of(params, model, ctx).batches(_BATCH),
            calibration.drawn(params) | {"batch": _BATCH},
            params.data_config,
            params.seed,
        )
        found, ctx.facts["corrections"] = losses(subject, options, ctx.progress, ctx.statistics)
        return found


def _by_rule(
    info: ModelInfo, params: SelectiveMixedPrecision.Params, options: Mapping[str, tuple[Layer, ...]]
) -> dict[str, Layer]:
    """The settings of a named rule."""
    rich = precision.preset(params.algorithm, options, int(info.config["num_hidden_layers"]))
    return {name: many[name in rich] for name, many in options.items()}


_BATCH = 1024  # tokens whose activations are held for the backward pass
