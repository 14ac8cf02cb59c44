"""Adapters in PEFT's form: a small folder that refers to its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olive.config.base import Dtype
from olive.errors import ConfigError, PassFailed
from olive.models import seen
from olive.models.artifact import Kind
from olive.models.hf import describe, load_model

if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(base_folder: Path, adapter_folder: Path, dtype: Dtype, device: str = "cpu") -> PeftModel:
    """A base model, as the adapter's training saw it, with the adapter in place, unmerged, for evaluation.

    PEFT only warns when a tensor of the adapter finds no place; here every one must have been taken.

    Raises:
        ConfigError, UntrustedInput: as ``describe``, for either folder.
        PassFailed: tensors of the adapter and places in the base differ.
    """
    adapter = describe(adapter_folder)
    if adapter.kind is not Kind.ADAPTER:
        raise ConfigError(f"{adapter_folder} is no adapter", fix="Name a folder with adapter_config.json.")
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    base = load_model(base_folder, dtype=dtype, device=device)
    if (given := seen.read(adapter_folder)) is not None:
        given.apply(base)
    try:
        model = PeftModel.from_pretrained(base, adapter_folder, torch_device=str(base.device))
    except (ValueError, RuntimeError, KeyError) as error:
        raise PassFailed(
            f"the adapter {adapter_folder} does not fit the base {base_folder}: {error}",
            fix="Use the base it was trained on.",
        ) from error
    # An adapter may carry whole embedding tables beside its own tensors; asking "auto" may ask the network.
    needed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    taken = needed | set(get_peft_model_state_dict(model, save_embedding_layers=True))
    for names, what in (
        (adapter.tensors.keys() - taken, "that no module of the base takes"),
        (needed - adapter.tensors.keys(), "missing that the base has a place for"),
    ):
        if names:
            raise PassFailed(
                f"the adapter {adapter_folder} has {len(names)} tensors {what}, such as {min(names)}",
                fix="Use the base it was trained on.",
            )
    return model.to(getattr(torch, dtype)).eval()
