"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) and what only changes its scale or its start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from olive.models.artifact import Artifact
from olive.passes.base import PassContext
from olive.passes.finetune.tuning import Tuning, TuningParams

if TYPE_CHECKING:
    from peft import PeftConfig


class LoraParams(TuningParams):
    """What LoRA and the methods built on it have in common."""

    r: int = Field(64, ge=1, description="Rank of the update.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    use_rslora: bool = Field(
        False, description="Scale by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732)."
    )


def lora_config(params: LoraParams, modules: list[str] | str, **more: Any) -> PeftConfig:
    """PEFT's LoraConfig of ``params``."""
    from peft import LoraConfig

    return LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,
        lora_dropout=params.lora_dropout,
        use_rslora=params.use_rslora,
        bias="none",
        **params.placement(modules),
        **more,
    )


L = TypeVar("L", bound=LoraParams)


class LowRank(Tuning[L]):
    """Base of the methods whose adapter is a plain LoRA: ``W + scale * B A``."""

    def peft_config(self, params: L, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        return lora_config(params, modules)

    def parameters_of(self, params: L, rows: int, columns: int) -> int:
        """A (r, columns) and B (rows, r)."""
        return params.r * (rows + columns)

    def save(self, tuned: Any, model: Artifact, params: L, ctx: PassContext) -> None:
        """Write the adapter."""
        super().save(tuned, model, params, ctx)
        ctx.attributes |= {"r": params.r, "alpha": params.alpha}


class LoRA(LowRank["LoRA.Params"]):
    """Fine-tune low-rank adapters on a dataset; the base stays as it is and is referred to, not copied."""

    class Params(LoraParams):
        """Names and defaults of Olive 0.13."""

        init_lora_weights: Literal["default", "gaussian", "pissa", "olora"] = Field(
            "default",
            description="How the factors start. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) start "
            "from the weight itself and converge faster; the result is stored as a LoRA of twice the rank.",
        )

    def peft_config(self, params: Params, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        start: bool | str = params.init_lora_weights
        return lora_config(params, modules, init_lora_weights=True if start == "default" else start)

    def adapt(self, base: Any, model: Artifact, params: Params) -> Any:
        """Keep the factors that were taken off the base, for ``save``."""
        tuned = super().adapt(base, model, params)
        if params.init_lora_weights in ("pissa", "olora") and model.base is None:
            tuned.olive_initial = initial_factors(tuned)
        return tuned

    def save(self, tuned: Any, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write an adapter of the stored base: what was taken off it is given back in the factors.

        ``W - s B0 A0 + s B A = W + s [B, B0] [A; -A0]``.
        """
        super().save(tuned, model, params, ctx)
        if (initial := getattr(tuned, "olive_initial", None)) is not None:
            give_back(ctx.out, initial)


def initial_factors(tuned: Any) -> dict[str, Any]:
    """The factors of every adapted layer by the names PEFT saves them under, copied to the CPU."""
    from olive.passes.finetune.checkpoints import trained_state

    return {name: value for name, value in trained_state(tuned).items() if ".lora_" in name}


def give_back(folder: Any, initial: dict[str, Any]) -> None:
    """Turn an adapter of a changed base into one of the stored base, of twice the rank, in place."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = load_file(weights)
    for name, start in initial.items():
        trained = state[name]
        parts = (trained, -start.to(trained)) if ".lora_A" in name else (trained, start.to(trained))
        state[name] = torch.cat(parts, 0 if ".lora_A" in name else 1).contiguous()
    save_file(state, weights, metadata={"format": "pt"})
    config = json.loads(settings.read_text(encoding="utf-8"))
    # alpha / r stays; alpha / sqrt(r) needs the root of two beside
    factor = 2**0.5 if config.get("use_rslora") else 2
    config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "init_lora_weights": True}
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
