"""Checkpoints of training in the journal: safetensors and weights-only state. Imported where torch is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

ADAPTER = "adapter.safetensors"
BEST = "best.safetensors"
STATE = "state.pt"
TRAINER_STATE = "trainer_state.json"


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """The trained tensors, an adapter's by PEFT's names, on the CPU, each with its own memory."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model)
    else:
        state = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def load_trained(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Undo ``trained_state``, bit for bit."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, state)
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def write(folder: Path, trainer: Any, best: dict[str, torch.Tensor] | None) -> None:
    """Everything that resuming needs, into ``folder``."""
    from safetensors.torch import save_file

    save_file(trained_state(trainer.model), folder / ADAPTER)
    if best is not None:
        save_file(best, folder / BEST)
    scaler = getattr(trainer.accelerator, "scaler", None)
    torch.save(
        {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": rng_state(),
        },
        folder / STATE,
    )
    trainer.state.save_to_json(str(folder / TRAINER_STATE))


def read(folder: Path, device: Any = "cpu") -> dict[str, Any]:
    """The state that ``write`` left, without unpickling code."""
    loaded: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
    return loaded


def rng_state() -> dict[str, Any]:
    """States of every generator training may draw from, as tensors and plain JSON."""
    import random

    import numpy

    kind, keys, place, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, [int(key) for key in keys], int(place), int(has_gauss), float(gauss)]),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo ``rng_state``."""
    import random

    import numpy

    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, has_gauss, held = json.loads(state["numpy"])
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), place, has_gauss, held))
    torch.random.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([entry.cpu() for entry in state["cuda"]])
