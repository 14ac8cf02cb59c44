"""Models built without weights, and filled tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olive.config.base import Dtype
from olive.errors import ConfigError
from olive.models.quantised import DequantisedTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(folder: Path, attn_implementation: str | None = "sdpa") -> PreTrainedModel:
    """A causal language model in evaluation mode whose parameters are on the meta device.

    Buffers, such as the frequencies of rotary embeddings, are real. Only classes of transformers itself are
    built; nothing of the folder is run, and no weight is read.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()  # parameters are made anew without weights, each on its own
    return model.eval()


def load_expanded(folder: Path, dtype: Dtype, attn_implementation: str | None = "sdpa") -> PreTrainedModel:
    """A model stored as integers, in floating point: what its integers stand for.

    Raises:
        ConfigError: a tensor is missing or has the wrong shape.
    """
    import torch
    from torch import nn
    from transformers import GenerationConfig

    from olive.models.hf import read_json

    model = skeleton(folder, attn_implementation)
    with DequantisedTensors(folder, read_json(folder / "config.json")) as tensors:
        names = set(tensors.names())
        for name, parameter in list(model.named_parameters()):
            if name not in names:
                raise ConfigError(
                    f"{folder} has no {name}", fix="Check that config and weights belong together."
                )
            value = tensors.expanded(name).to(getattr(torch, dtype))
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"{folder} has the wrong shape for {name}: {tuple(value.shape)}, not "
                    f"{tuple(parameter.shape)}",
                    fix="Check that config and weights belong together.",
                )
            holder, _, last = name.rpartition(".")
            setattr(model.get_submodule(holder), last, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model
