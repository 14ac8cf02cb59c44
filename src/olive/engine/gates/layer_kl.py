"""What each quantised layer alone does to the predictions, for the report. Needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olive.models.hf import read_json
from olive.models.quantised import DequantisedTensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TOKENS = 64  # of a prompt


def fits(parameters: int, free: int) -> bool:
    """Whether ``by_layer`` finds its memory: the model in float32 and the changes of its layers in bfloat16.

    Args:
        parameters: of the model.
        free: bytes, without the model.
    """
    return 6.5 * parameters <= free


def by_layer(model: PreTrainedModel, quantised: Path, prompts: Sequence[list[int]]) -> dict[str, float]:
    """KL(model || model with this layer quantised), nat a token: the second-order estimate of one backward.

    Args:
        model: before it was quantised, float32.
        quantised: the folder of integers.
        prompts: token ids.

    Returns:
        Of each layer; nothing where the method moved scales between layers, so that a layer's change is no
        change of its weights alone.
    """
    import torch
    from torch import nn

    from olive.quantization.sensitivity import expected_kl

    changes: dict[str, Sequence[torch.Tensor]] = {}
    with DequantisedTensors(quantised, read_json(quantised / "config.json")) as tensors:
        own = dict(model.named_parameters())
        for name in (name for name in own if own[name].dim() == 1 and name in tensors.stored):
            if not torch.equal(tensors.stored[name].float(), own[name].detach().float()):
                return {}
        for name in tensors.layers:
            if isinstance(module := model.get_submodule(name), nn.Linear):
                change = tensors.expanded(f"{name}.weight").float() - module.weight.detach()
                changes[name] = [change.bfloat16()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batches = [(ids[None], torch.ones_like(ids, dtype=torch.bool)[None]) for ids in map(_tensor, prompts)]
    return {name: values[0] for name, values in expected_kl(model, batches, changes).items()}


def _tensor(ids: list[int]) -> torch.Tensor:
    import torch

    return torch.tensor(ids[:_TOKENS])
