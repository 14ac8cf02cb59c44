"""Fine-tuning of the weights themselves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from olive.config.base import Dtype
from olive.hardware.probe import training_dtype
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.base import PassContext
from olive.passes.finetune.targets import chosen
from olive.passes.finetune.tuning import Tuning, TuningParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FullFinetune(Tuning["FullFinetune.Params"]):
    """Train every weight, or those of the layers named; the result is a whole model.

    Weights and optimizer are float32, since steps are smaller than 16 bits resolve; where the device
    multiplies bfloat16 natively, products are computed in it.
    """

    class Params(TuningParams):
        """``target_modules`` and ``layers_to_transform`` left out: everything is trained."""

    accepts, produces = (Kind.HF,), Kind.HF

    def dtype_of(self, params: Params, ctx: PassContext) -> Dtype:
        """Master weights are float32 unless the document insists."""
        return params.torch_dtype or "float32"

    def arguments(self, params: Params, ctx: PassContext) -> dict[str, Any]:
        """Products in bfloat16 where they are native and nothing else is asked for."""
        given = dict(params.training_args)
        native = training_dtype(ctx.machine, ctx.accelerator.device)
        if self.dtype_of(params, ctx) == "float32" and native == "bfloat16" and not given.get("fp16"):
            given.setdefault("bf16", True)
        return given

    def trained_parameters(self, model: ModelInfo, params: Params) -> int:
        """Every number, or those of the layers named."""
        if params.target_modules is None and params.layers_to_transform is None:
            return model.parameters
        return super().trained_parameters(model, params)

    def parameters_of(self, params: Params, rows: int, columns: int) -> int:
        """The whole weight."""
        return rows * columns

    def adapt(self, base: PreTrainedModel, model: Artifact, params: Params) -> Any:
        """``base`` with gradients for what is trained."""
        from olive.passes.finetune.base_weights import linear_names

        if params.target_modules is None and params.layers_to_transform is None:
            return base.requires_grad_(True)
        base.requires_grad_(False)
        names = chosen(
            base.config.to_dict(),
            "all-linear" if params.target_modules is None else params.target_modules,
            params.layers_to_transform,
            linear_names(base),
        )
        for name in names:
            base.get_submodule(name).requires_grad_(True)
        for name, module in base.named_modules():
            if params.modules_to_save and re.search(rf"(^|\.)({'|'.join(params.modules_to_save)})$", name):
                module.requires_grad_(True)
        return base

    def save(self, tuned: Any, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the model with the base's tokenizer."""
        from olive.models.hf import save_model

        save_model(tuned, model.path, ctx.out)
