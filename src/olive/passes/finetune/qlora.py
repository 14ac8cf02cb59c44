"""LoRA on a base of 4 or 8 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import AliasChoices, Field

from olive.config.base import Dtype
from olive.models.artifact import Artifact, ModelInfo
from olive.models.seen import Seen
from olive.passes.base import PassContext
from olive.passes.finetune.lora import LoraParams, LowRank
from olive.passes.finetune.targets import linear_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QuantisedParams(LoraParams):
    """What the methods on a rounded base have in common."""

    quant_type: Literal["nf4", "fp4", "int8"] = Field(
        "nf4", description="Grid of the base: nf4 and fp4 in blocks of 64, int8 a scale a row."
    )
    double_quant: bool = Field(False, description="Store the scales of 4-bit blocks in 8 bits.")
    torch_dtype: Dtype | None = Field(
        None,
        validation_alias=AliasChoices("torch_dtype", "compute_dtype"),
        description="Dtype that weights are expanded to; default: what the device does natively.",
    )


Q = TypeVar("Q", bound=QuantisedParams)


class Rounded(LowRank[Q]):
    """Base of the methods that train on rounded weights."""

    def base_bytes(self, model: ModelInfo, params: Q, width: int) -> int:
        """Embeddings and head as they are, the rest as it is rounded."""
        scheme = seen_of(params, frozenset()).scheme
        linear = [shape for name, shape in linear_weights(model) if not name.endswith("lm_head")]
        rounded = sum(scheme.bytes_of(*shape) for shape in linear)
        return rounded + width * (model.parameters - sum(rows * columns for rows, columns in linear))

    def load_base(
        self, folder: Path, params: Q, dtype: Dtype, ctx: PassContext, told: Seen | None
    ) -> PreTrainedModel:
        """The base with rounded layers, expanded once where a CPU has the memory for it."""
        if told is not None:
            return super().load_base(folder, params, dtype, ctx, told)
        from olive.passes.finetune.base_weights import linear_names, load_on_cpu, round_base

        base = load_on_cpu(folder, dtype)
        seen = seen_of(params, frozenset(linear_names(base, params.modules_to_save or ())))
        return round_base(base, folder, seen, dtype, ctx)

    def save(self, tuned: Any, model: Artifact, params: Q, ctx: PassContext) -> None:
        """Write the adapter."""
        super().save(tuned, model, params, ctx)
        ctx.attributes["quant_type"] = params.quant_type


class QLoRA(Rounded["QLoRA.Params"]):
    """Fine-tune low-rank adapters on a base whose linear layers are rounded to 4 or 8 bits.

    The merge starts from the rounded weights, as training did, so that what was learnt is what is exported.
    """

    class Params(QuantisedParams):
        """Names of Olive 0.13."""


def seen_of(params: QuantisedParams, modules: frozenset[str]) -> Seen:
    """How ``params`` round the ``modules``."""
    return Seen(params.quant_type, 64, params.double_quant and params.quant_type != "int8", modules)
