"""Adapters that PEFT made, and a context to run a pass in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olive.config.workflow import Accelerator
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import load_model
from olive.passes.base import PassContext
from olive.store.journal import Journal


class Silent:
    """A progress that says nothing."""

    def start(self, task: str, total: int | None = None) -> None: ...
    def update(self, done: int, **fields: float | str) -> None: ...
    def finish(self) -> None: ...
    def note(self, message: str) -> None: ...


def context(folder: Path) -> PassContext:
    out = folder / "out"
    out.mkdir(parents=True)
    return PassContext(
        out=out,
        machine=probe(),
        accelerator=Accelerator(),
        target=Accelerator(),
        data={},
        base_dir=folder,
        progress=Silent(),
        journal=Journal(folder / "journal"),
    )


def make_adapter(base: Path, folder: Path, *, std: float = 0.1, **settings: Any) -> Path:
    """A LoRA adapter of ``base`` as PEFT saves it; B is drawn with ``std``."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "qkv_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_model(base, dtype="float32"), LoraConfig(**(given | settings)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # PEFT starts both at zero
            torch.nn.init.normal_(parameter, std=std) if std else torch.nn.init.zeros_(parameter)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def artifact(base: Path, adapter: Path, **attributes: Any) -> Artifact:
    model = Artifact(kind=Kind.HF, path=base, digest="b" * 64)
    return Artifact(kind=Kind.ADAPTER, path=adapter, digest="a" * 64, base=model, attributes=attributes)
