"""LoRA that starts from what rounding took away (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config.base import Dtype
from olive.models.artifact import Artifact
from olive.models.seen import Seen
from olive.passes.base import PassContext
from olive.passes.finetune.qlora import QuantisedParams, Rounded, seen_of
from olive.passes.finetune.targets import chosen

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from olive.quantization.blockwise import Scheme


class LoftQ(Rounded["LoftQ.Params"]):
    """QLoRA whose factors start as the best low-rank image of the rounding error, not at zero."""

    class Params(QuantisedParams):
        """Names of Olive 0.13."""

        loftq_iter: int = Field(1, ge=1, le=20, description="Alternations of rounding and decomposing.")

    def load_base(
        self, folder: Path, params: Params, dtype: Dtype, ctx: PassContext, told: Seen | None
    ) -> PreTrainedModel:
        """The base with rounded layers; those that get adapters less what these start with."""
        from olive.models.hf import open_model
        from olive.passes.finetune.base_weights import linear_names, load_on_cpu, round_base

        if told is not None:
            return super().load_base(folder, params, dtype, ctx, told)
        base = load_on_cpu(folder, dtype)
        names = linear_names(base, params.modules_to_save or ())
        seen = seen_of(params, frozenset(names))
        device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
        adapted = chosen(base.config.to_dict(), params.target_modules, params.layers_to_transform, names)
        initial = {}
        with open_model(folder)[0] as stored:
            for done, name in enumerate(adapted):
                ctx.progress.update(done)
                weight = stored[f"{name}.weight"].to(device).float()
                a, b = alternate(weight, seen.scheme, params.r, params.loftq_iter)
                initial[name] = (a.cpu(), b.cpu())
        return round_base(base, folder, replace(seen, initial=initial), dtype, ctx)

    def adapt(self, base: Any, model: Artifact, params: Params) -> Any:
        """Adapters that start with what was taken off."""
        import torch

        tuned = super().adapt(base, model, params)
        if model.base is None:
            scale = params.alpha / (params.r**0.5 if params.use_rslora else params.r)
            for name, (a, b) in base.olive_seen.initial.items():
                layer = tuned.get_base_model().get_submodule(name)
                with torch.no_grad():
                    layer.lora_A["default"].weight.copy_(a)
                    layer.lora_B["default"].weight.copy_(b / scale)
        return tuned


def alternate(
    weight: torch.Tensor, scheme: Scheme, rank: int, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the rounding error.

    Args:
        weight: float32 (rows, columns).
        scheme: of the rounding.
        rank: of the factors.
        rounds: each rounds ``W - B A`` and decomposes what is then missing.

    Returns:
        A (rank, columns) and B (rows, rank), float32, the singular values shared evenly.
    """
    import torch

    from olive.quantization.blockwise import round_trip

    taken = torch.zeros_like(weight)
    for _ in range(rounds):
        left, values, right = torch.linalg.svd(
            weight - round_trip(weight - taken, scheme), full_matrices=False
        )
        root = values[:rank].sqrt()
        a, b = root[:, None] * right[:rank], left[:, :rank] * root
        taken = b @ a
    return a, b
