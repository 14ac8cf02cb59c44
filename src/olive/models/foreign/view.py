"""The tensors of a foreign model in our layout, each made when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError
from olive.models.quantised import EMBEDDING, HEAD, Layer, method_of, settings
from olive.models.stream import Layout, LazyTensors
from olive.models.tensors import Tensors

if TYPE_CHECKING:
    import torch

Load = Callable[[str], "torch.Tensor"]
_WIDTHS = (128, 64, 32, 256, 16)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of our layout.

    Attributes:
        layout: its dtype as safetensors names it, and its shape.
        source: the stored tensor it is mostly made of.
        make: makes it; None to take the stored one as it is.
    """

    layout: Layout
    source: str
    make: Callable[[Load], torch.Tensor] | None = None


@dataclass(slots=True)
class View:
    """A foreign model in our terms.

    Attributes:
        parts: our name -> how to make the tensor, in the order of the stored ones.
        layers: what is stored as integers, and how.
        notes: what a user should know of the translation.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, name: str, stored: Tensors) -> None:
        """A tensor that is as it is."""
        self.parts[name] = Part(stored[name], name)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's config with our settings of quantisation, or without any."""
        ours = {name: value for name, value in config.items() if name != "quantization_config"}
        if self.layers:
            kinds = list(self.layers.values())
            default = max(kinds, key=kinds.count)
            ours["quantization_config"] = settings(
                default,
                self.layers,
                head=HEAD in self.layers,
                tied=HEAD in self.layers and f"{EMBEDDING}.weight" not in self.parts,
            ) | {"stored_as": method_of(config) or "gguf"}
        return ours


class ForeignTensors(LazyTensors):
    """Tensors of our layout, made from those of a foreign folder.

    Args:
        folder: of the model.
        view: how.
    """

    def __init__(self, folder: Path, view: View) -> None:
        super().__init__(folder)
        self._parts = view.parts
        by_source: dict[str, list[str]] = {}
        for name, part in view.parts.items():
            by_source.setdefault(part.source, []).append(name)
        self.by_file = {
            file: [name for source in names for name in by_source.get(source, ())]
            for file, names in self.by_file.items()
        }
        self.layout = {name: part.layout for name, part in view.parts.items()}

    def __enter__(self) -> ForeignTensors:
        ours, layout = self.by_file, self.layout
        stored = LazyTensors(self.folder)
        self.by_file, self.layout = stored.by_file, stored.layout
        super().__enter__()
        self.by_file, self.layout = ours, layout
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        load = super().__getitem__
        if part.make is None:
            return load(part.source)
        made = part.make(load)
        if tuple(made.shape) != part.layout[1]:
            raise ConfigError(
                f"{name} of {self.folder} came out as {tuple(made.shape)}, not {part.layout[1]}",
                fix="Copy or download the model again.",
            )
        return made


def quantised_names(stored: Tensors, suffix: str) -> Iterator[str]:
    """Layers that have a tensor called ``suffix``."""
    return (name.removesuffix(suffix) for name in stored if name.endswith(suffix))


def need(stored: Tensors, name: str) -> Layout:
    """Header of a tensor that must be there.

    Raises:
        ConfigError: it is not.
    """
    if name not in stored:
        raise ConfigError(
            f"the model has no {name}, which its quantisation needs", fix="Copy or download the model again."
        )
    return stored[name]


def expect(stored: Tensors, name: str, code: str, shape: tuple[int, ...]) -> None:
    """Hold a header against what the format says.

    Raises:
        ConfigError: it is missing or different.
    """
    found = need(stored, name)
    if found != (code, shape):
        raise ConfigError(
            f"{name} is {found[0]} {found[1]}, and its layer needs {code} {shape}",
            fix="The file is damaged, or quantization_config describes another model.",
        )


def grouping(columns: int, blocks: int, name: str) -> tuple[int, int]:
    """Weights of a block of ours, and how many of ours one stored block is cut into.

    A scale that holds for more weights than an operator's block can is repeated, which changes no value.

    Raises:
        ConfigError: blocks do not divide the row.
    """
    if not blocks or columns % blocks:
        raise ConfigError(
            f"{name} has {blocks} scales a row for {columns} weights", fix="Copy or download the model again."
        )
    width = columns // blocks
    for ours in (width, *_WIDTHS) if width in _WIDTHS else _WIDTHS:
        if width % ours == 0:
            return ours, width // ours
    return width, 1
