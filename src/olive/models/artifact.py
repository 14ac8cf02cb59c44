"""A model on disk: kind, folder, digest and attributes. Never a live model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field

from olive.config.base import Frozen
from olive.models.onnx_header import GraphInfo


class Kind(StrEnum):
    """What form a model has."""

    HF = "hf"
    ADAPTER = "adapter"
    ONNX = "onnx"
    GENAI = "genai"
    GGUF = "gguf"


class Artifact(Frozen):
    """A model in some form, content-addressed.

    Attributes:
        kind: its form.
        path: the folder that holds it.
        digest: sha256 over names, sizes and sha256 of every file, hex.
        attributes: JSON facts about it (dtype, precision, ...).
        base: the model an adapter applies to; referred to, never copied.
    """

    kind: Kind
    path: Path
    digest: str
    attributes: dict[str, Any] = Field(default_factory=dict)
    base: Artifact | None = None


class ModelInfo(Frozen):
    """What a plan knows of a model without loading it.

    Attributes:
        path: the folder.
        kind: its form.
        config: parsed config.json.
        tensors: tensor name -> (dtype as safetensors names it, shape).
        chat_template: whether the tokenizer brings one.
        adapter: folder of the adapter that the document brings beside the model.
        notes: what its user should know, e.g. of a format that was translated.
        graph: of an ONNX model.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    chat_template: bool = False
    adapter: Path | None = None
    notes: tuple[str, ...] = ()
    graph: GraphInfo | None = None

    @property
    def architecture(self) -> str:
        """First entry of ``architectures``, or an empty string."""
        return str((self.config.get("architectures") or [""])[0])

    @property
    def parameters(self) -> int:
        """Number of stored parameters."""
        total = 0
        for _, shape in self.tensors.values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total
