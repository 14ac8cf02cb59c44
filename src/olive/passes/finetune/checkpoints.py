"""Checkpoints of training in the journal: safetensors and weights-only state. Imported where torch is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from olive.errors import PassFailed
from olive.passes.finetune.parallel import like, whole

ADAPTER = "adapter.safetensors"
BEST = "best.safetensors"
STATE = "state.pt"
TRAINER_STATE = "trainer_state.json"


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """The trained tensors, an adapter's by PEFT's names, on the CPU, each with its own memory.

    Where they are sharded every process has to ask.
    """
    state = _trained(model)
    return {name: whole(tensor.detach()).to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def _trained(model: Any) -> dict[str, torch.Tensor]:
    """The trained tensors where they are."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def load_trained(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Undo ``trained_state``, bit for bit."""
    held = _trained(model)
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, {name: like(value, held[name]) for name, value in state.items()})
        return
    with torch.no_grad():
        for name, value in state.items():
            held[name].copy_(like(value, held[name]))


def write(trainer: Any, best: dict[str, torch.Tensor] | None) -> Callable[[Path], None]:
    """Everything that resuming needs, as a function that writes it into a folder.

    Gathering it takes every process, writing it takes one.
    """
    trained = trained_state(trainer.model)
    optimizer = trainer.optimizer.state_dict()
    held = {
        index: {name: whole(value) if torch.is_tensor(value) else value for name, value in values.items()}
        for index, values in optimizer["state"].items()
    }
    scaler = getattr(trainer.accelerator, "scaler", None)
    state = {
        "optimizer": {**optimizer, "state": held},
        "scheduler": trainer.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "rng": trainer.world.gather(rng_state()),
    }

    def into(folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(trained, folder / ADAPTER)
        if best is not None:
            save_file(best, folder / BEST)
        torch.save(state, folder / STATE)
        trainer.state.save_to_json(str(folder / TRAINER_STATE))

    return into


def sums(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """A number for each tensor that changes when it does."""
    return {name: float(value.double().sum()) for name, value in state.items()}


def prove(trainer: Any, start: dict[str, float]) -> None:
    """Save the adapter after its first step, read it again, and hold it against what it must be.

    Args:
        trainer: after an optimizer step with a learning rate above zero.
        start: ``sums`` before it.

    Raises:
        PassFailed: a tensor is missing, empty, no number, not what was saved, the same as before in all its
            places, or another in another process: what is wrong now is wrong after hours too.
    """
    from safetensors.torch import load_file, save_file

    state = trained_state(trainer.model)
    with tempfile.TemporaryDirectory() as scratch:
        save_file(state, Path(scratch, ADAPTER))
        read_again = load_file(Path(scratch, ADAPTER))
    wrong = [
        name
        for name, value in state.items()
        if not value.numel() or not torch.equal(value, read_again.get(name, torch.empty(0)))
    ]
    after = sums(state)
    step = trainer.state.global_step
    others = trainer.world.gather(after)
    fix = "Report this: the adapter of this model is not trained or not saved."
    if wrong or not state:
        what = wrong[0] if wrong else "the whole adapter"
        raise PassFailed(f"saved after step {step} and read again, {what} is not what was trained", fix=fix)
    if after == start:
        raise PassFailed(f"step {step} changed no tensor of the adapter", fix=fix)
    if any(other != after for other in others):
        raise PassFailed(f"after step {step} the processes hold different adapters", fix=fix)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint."""
    from safetensors.torch import load_file

    return load_file(folder / ADAPTER)


def best_weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """The best trained tensors so far, where they are kept."""
    from safetensors.torch import load_file

    return load_file(folder / BEST) if (folder / BEST).exists() else None


def read(folder: Path, device: Any = "cpu") -> dict[str, Any]:
    """The state that ``write`` left, without unpickling code."""
    loaded: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
    return loaded


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state that ``write`` took, in shards where its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {
        index: {
            name: like(value, parameters[index]) if torch.is_tensor(value) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": held})


def rng_state() -> dict[str, Any]:
    """States of every generator training may draw from, as JSON."""
    import random

    import numpy

    kind, keys, place, has_gauss, gauss = numpy.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "torch": _hex(torch.random.get_rng_state()),
        "cuda": [_hex(state) for state in cuda],
    }


def set_rng_state(states: Sequence[dict[str, Any]], rank: int) -> None:
    """Undo ``rng_state`` of the process ``rank``; the first one's where it had none."""
    import random

    import numpy

    state = states[rank if rank < len(states) else 0]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, has_gauss, held = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), place, has_gauss, held))
    torch.random.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_tensor(entry) for entry in state["cuda"]])


def _hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
