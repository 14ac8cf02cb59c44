"""What training takes in memory, and how many tokens a forward pass may hold. No torch.

A decoder layer keeps for its backward the inputs of its norms, of its linear layers and of attention; with
activation checkpointing it keeps its own input alone, and one layer at a time keeps the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# tokens of one forward pass beyond which nothing is gained; on a CPU more leaves the caches
MOST_TOKENS = {"cpu": 1024, "gpu": 8192}
_SHARE = 0.9  # of the free memory that is planned with: the rest is fragments and what libraries take
_PLAIN = 1.8  # autograd's own graphs keep this many times what ``fused`` keeps
_HEAD = {"cpu": 64 << 20, "gpu": 1024 << 20}  # blocks of logits and what the head keeps beside them
_SMALL_HEAD = 384 << 20  # with small blocks
SMALL_BLOCK = 64 << 20


@dataclass(frozen=True, slots=True)
class Passes:
    """How training cuts its work.

    Attributes:
        tokens: of one forward pass at most; a longer row has its own.
        checkpointing: whether layers compute their activations twice.
        offload: whether the layers' inputs and the embedding wait in the host's memory.
    """

    tokens: int
    checkpointing: bool
    offload: bool = False


def token_bytes(
    config: Mapping[str, Any],
    width: int,
    *,
    checkpointing: bool,
    fused: bool = True,
    offload: bool = False,
) -> int:
    """Bytes that the backward of one token needs.

    Args:
        config: of the model, as transformers names it.
        width: bytes of a number.
        checkpointing: whether activations are computed twice.
        fused: whether the layers are those of ``olive.passes.finetune.fused``.
        offload: whether the layers' inputs wait in the host's memory.
    """
    hidden = int(config.get("hidden_size") or 1024)
    layers = int(config.get("num_hidden_layers") or 24)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    heads = int(config.get("num_attention_heads") or 1)
    size = int(config.get("head_dim") or hidden // heads)
    keys = int(config.get("num_key_value_heads") or heads)
    layer = (4 * hidden + 2 * heads * size + 2 * keys * size + 3 * inner) * width
    layer = int(layer * (1 if fused else _PLAIN))
    if offload:
        return 2 * layer + hidden * width
    if checkpointing:
        return layers * hidden * width + 2 * layer
    return layers * layer


def choose(
    config: Mapping[str, Any],
    *,
    width: int,
    free: int,
    trained: int,
    moments: int = 8,
    longest: int,
    device: str,
    fused: bool = True,
    checkpointing: bool | None = None,
    embedding: int = 0,
) -> Passes:
    """Tokens of a forward pass, and whether to checkpoint activations, by what is free.

    Checkpointing costs a third more work, so it is chosen only where the longest row would not fit otherwise;
    where it does not fit then either, what waits is kept in the host's memory.

    Args:
        config: of the model.
        width: bytes of an activation.
        free: bytes free on the device with the model loaded.
        trained: numbers trained; each takes a gradient of 4 bytes and, for the products, a copy of 2.
        moments: bytes that the optimizer keeps of each.
        longest: tokens of the longest row.
        device: ``cpu`` or ``gpu``.
        fused: whether the layers keep no more than they need.
        checkpointing: what the document says; None to choose.
        embedding: bytes of an embedding that could wait in the host's memory.
    """
    most = MOST_TOKENS["cpu" if device == "cpu" else "gpu"]
    left = int(free * _SHARE) - (6 + moments) * trained - _HEAD["cpu" if device == "cpu" else "gpu"]
    fit = {
        twice: left // max(1, token_bytes(config, width, checkpointing=twice, fused=fused))
        for twice in (False, True)
    }
    twice = fit[False] < longest if checkpointing is None else checkpointing
    if twice and device != "cpu" and fused and fit[True] < longest:
        left += embedding + _HEAD["gpu"] - _SMALL_HEAD
        fits = left // token_bytes(config, width, checkpointing=True, offload=True)
        return Passes(max(1, min(most, fits)), True, True)
    return Passes(max(1, min(most, fit[twice])), twice)
