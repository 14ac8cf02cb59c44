"""LoRA on a base of 4 or 8 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import AliasChoices, Field

from olive.config.base import Dtype
from olive.config.workflow import Accelerator
from olive.errors import Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, ModelInfo
from olive.models.seen import Seen
from olive.passes.base import PassContext
from olive.passes.finetune.lora import LoraParams, lora_config
from olive.passes.finetune.targets import linear_weights
from olive.passes.finetune.tuning import Tuning

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_HEADROOM = 0.5  # of the memory available that an expanded base may take


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


class Rounded(Tuning[Q]):
    """Base of the methods that train on rounded weights."""

    def check(
        self, model: ModelInfo, params: Q, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """As LoRA; on a GPU, bitsandbytes expands 4-bit weights."""
        yield from super().check(model, params, machine, accelerator)
        if (
            accelerator.device == "gpu"
            and params.quant_type != "int8"
            and "bitsandbytes" not in machine.packages
        ):
            yield Problem(
                "bitsandbytes is not installed, and expands the 4-bit weights on a GPU",
                fix="pip install 'olive-next[gpu]'",
                exit_code=5,
            )

    def peft_config(self, params: Q, modules: list[str] | str) -> PeftConfig:
        """PEFT's description."""
        return lora_config(params, modules)

    def parameters_of(self, params: Q, rows: int, columns: int) -> int:
        """A (r, columns) and B (rows, r)."""
        return params.r * (rows + columns)

    def base_bytes(self, model: ModelInfo, params: Q, width: int) -> int:
        """Embeddings and head as they are, the rest as it is rounded."""
        scheme = seen_of(params, frozenset()).scheme
        linear = [shape for name, shape in linear_weights(model) if not name.endswith("lm_head")]
        rounded = sum(scheme.bytes_of(*shape) for shape in linear)
        return rounded + width * (model.parameters - sum(rows * columns for rows, columns in linear))

    def load_base(self, folder: Path, params: Q, dtype: Dtype, ctx: PassContext) -> PreTrainedModel:
        """The base with rounded layers, expanded once where a CPU has the memory for it."""
        from olive.passes.finetune.base_weights import linear_names

        base = load_on_cpu(folder, dtype)
        seen = seen_of(params, frozenset(linear_names(base, params.modules_to_save or ())))
        return round_base(base, folder, seen, dtype, ctx)

    def save(self, tuned: Any, model: Artifact, params: Q, ctx: PassContext) -> None:
        """Write the adapter, and beside it what its base was rounded to."""
        super().save(tuned, model, params, ctx)
        tuned.olive_seen.write(ctx.out)
        ctx.attributes |= {"r": params.r, "alpha": params.alpha, "quant_type": params.quant_type}

    def adapt(self, base: Any, model: Artifact, params: Q) -> Any:
        """Remember how the base was rounded."""
        seen = base.olive_seen
        tuned = super().adapt(base, model, params)
        tuned.olive_seen = seen
        return tuned


class QLoRA(Rounded["QLoRA.Params"]):
    """Fine-tune low-rank adapters on a base whose linear layers are rounded to 4 or 8 bits.

    The merge starts from the rounded weights, as training did, so that what was learnt is what is exported.
    """

    class Params(QuantisedParams):
        """Names of Olive 0.13."""


def load_on_cpu(folder: Path, dtype: Dtype) -> PreTrainedModel:
    """The base on the CPU, with the packed attention."""
    from olive.models.hf import load_model
    from olive.passes.finetune import attention

    return load_model(folder, dtype=dtype, attn_implementation=attention.register())


def round_base(base: Any, folder: Path, seen: Seen, dtype: Dtype, ctx: PassContext) -> PreTrainedModel:
    """Round the layers that ``seen`` names and put the model on its device."""
    import torch

    from olive.passes.finetune.base_weights import quantise_base

    device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
    wide = getattr(torch, dtype)
    expanded = sum(base.get_submodule(name).weight.numel() for name in seen.modules) * wide.itemsize
    keep = device == "cpu" and expanded < _HEADROOM * ctx.machine.memory_available
    quantise_base(base, folder, seen, dtype=wide, device=device, keep_expanded=keep)
    base.olive_seen = seen
    ctx.facts["base"] = f"{seen.kind}, {'expanded once' if keep else 'expanded in each product'}"
    return base.to(device)


def seen_of(params: QuantisedParams, modules: frozenset[str]) -> Seen:
    """How ``params`` round the ``modules``."""
    return Seen(params.quant_type, 64, params.double_quant and params.quant_type != "int8", modules)
