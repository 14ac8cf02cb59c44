"""Models stored as integers, in the layout of Olive 0.9 and later (``quant_method: olive``).

A quantised layer ``NAME`` has ``NAME.qweight`` (uint8, rows x bytes, codes from the low bits on),
``NAME.scales`` (rows x blocks) and, unless it is symmetric, ``NAME.qzeros`` (uint8, rows x bytes). These are
the bytes of ONNX Runtime's MatMulNBits, so that an export copies them. Where embedding and head are one
matrix, a quantised head stands for both and ``model.embed_tokens.weight`` is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from olive.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Grid

METHOD = "olive"
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
_AGAIN = "Quantise the model again with Rtn, KQuant, Gptq, Awq or Hqq."


@dataclass(frozen=True, slots=True)
class Layer:
    """How one layer is stored.

    Attributes:
        bits: of a code.
        group_size: weights of a block; -1 for a whole row.
        symmetric: no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def grid(self) -> Grid:
        """Its grid; what codes mean, not how they were chosen."""
        from olive.quantization.grid import Grid

        return Grid(self.bits, self.group_size, "full_range" if self.symmetric else "asymmetric")

    def block_count(self, columns: int) -> int:
        """Blocks of a row."""
        return 1 if self.group_size == -1 else columns // self.group_size


def method_of(config: Mapping[str, Any]) -> str | None:
    """``quant_method`` of a model's config.json; None for a model in floating point."""
    found = (config.get("quantization_config") or {}).get("quant_method")
    return str(found) if found else None


def format_of(config: Mapping[str, Any]) -> str | None:
    """Which format the model is stored in on disk: ours, or another tool's that is presented as ours."""
    found = (config.get("quantization_config") or {}).get("stored_as")
    return str(found) if found else method_of(config)


def layer_of(config: Mapping[str, Any], name: str) -> Layer:
    """How the layer called ``name`` is stored, by the model's config.

    Raises:
        ConfigError: the quantisation config is damaged.
    """
    settings = config.get("quantization_config") or {}
    override = (settings.get("overrides") or {}).get(name, {})
    try:
        return Layer(
            int(override.get("bits", settings["bits"])),
            int(override.get("group_size", settings["group_size"])),
            bool(override.get("symmetric", settings["symmetric"])),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"quantization_config is damaged: {error!r}", fix=_AGAIN) from error


def settings(default: Layer, layers: Mapping[str, Layer], *, head: bool, tied: bool) -> dict[str, Any]:
    """``quantization_config`` for layers by name, of which most are stored as ``default``."""
    overrides: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        fields = ("bits", "group_size", "symmetric")
        different = {f: getattr(layer, f) for f in fields if getattr(layer, f) != getattr(default, f)}
        if different:
            overrides[name] = different
    return {
        "quant_method": METHOD,
        "bits": default.bits,
        "group_size": default.group_size,
        "symmetric": default.symmetric,
        "lm_head": head,
        "embeds": head and tied,
        "modules_to_not_convert": None,
        "overrides": overrides or None,
        "tie_word_embeddings": head and tied,
    }


class DequantisedTensors:
    """The tensors of a quantised model in floating point, each expanded when asked for. A context manager.

    Args:
        folder: of the model.
        config: its config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from olive.models.foreign.opened import open_tensors

        self.stored, self.config = open_tensors(folder, config)
        self.layers = sorted(
            name.removesuffix(".qweight") for name in self.stored if name.endswith(".qweight")
        )
        self._tied = f"{HEAD}.qweight" in self.stored and f"{EMBEDDING}.weight" not in self.stored

    def __enter__(self) -> Self:
        self.stored.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stored.__exit__(kind, error, trace)

    def names(self) -> Iterator[str]:
        """Names as a model in floating point has them."""
        parts = (".qweight", ".scales", ".qzeros")
        yield from (name for name in self.stored if not name.endswith(parts))
        yield from (f"{name}.weight" for name in self.layers)
        if self._tied:
            yield f"{EMBEDDING}.weight"

    def expanded(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` in a model in floating point; float32 where it was quantised.

        Raises:
            ConfigError: its parts do not fit each other.
        """
        if name in self.stored:
            return self.stored[name]
        if self._tied and name == f"{EMBEDDING}.weight":
            return self.expanded(f"{HEAD}.weight")
        layer = name.removesuffix(".weight")
        stored = layer_of(self.config, layer)
        packed, scales = self.stored[f"{layer}.qweight"], self.stored[f"{layer}.scales"]
        columns = packed.shape[1] * 8 // stored.bits
        if scales.shape != (packed.shape[0], stored.block_count(columns)):
            raise ConfigError(
                f"{layer} has scales {tuple(scales.shape)} for {columns} columns in blocks of "
                f"{stored.group_size}",
                fix=_AGAIN,
            )
        points = f"{layer}.qzeros"
        zeros = self.stored[points] if points in self.stored.layout else None
        return expand(stored, packed, scales, zeros, columns)


def expand(
    layer: Layer, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, columns: int
) -> torch.Tensor:
    """What packed tensors stand for, float32 (rows, columns)."""
    from olive.quantization.grid import Quantised
    from olive.quantization.packing import unpack

    points = None if zeros is None else unpack(zeros, layer.bits, scales.shape[1])
    return Quantised(layer.grid, unpack(packed, layer.bits, columns), scales.float(), points).dequantise()
