"""Finished layers of a quantisation in progress, each in a journal of its own: a killed step goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.models.quantised import Layer
from olive.store.integrity import FILES
from olive.store.journal import Journal

if TYPE_CHECKING:
    import torch

    from olive.quantization.grid import Quantised

_FILE = "layers.safetensors"
Row = dict[str, Any]


class Shelf:
    """Packed layers by unit: a decoder layer, or the head.

    Args:
        journal: of the step.
        behind: write a unit while the next one is computed; a kill then loses two units, not one.

    Attributes:
        rows: what was measured of each layer, in order.
        replaced: names of tensors that are not quantised and change all the same.
        resumed: units that an earlier run had finished.
    """

    def __init__(self, journal: Journal, *, behind: bool = False) -> None:
        self._journal = journal
        self._where: dict[str, Path] = {}
        self._writer = ThreadPoolExecutor(1)
        self._behind = behind
        self._writing: Future[None] | None = None
        self.rows: list[Row] = []
        self.replaced: set[str] = set()
        self.resumed = 0

    def take(self, unit: str) -> bool:
        """Whether an earlier run finished this unit; its measurements are kept then."""
        found = Journal(self._journal.path / unit).newest()
        if found is None:
            return False
        self._keep(found.path, found.state)
        self.resumed += 1
        return True

    def put(
        self,
        unit: str,
        layers: Mapping[str, tuple[Layer, Quantised]],
        rows: list[Row],
        replaced: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Pack and keep the layers of a unit, and float32 tensors of it that take the place of others."""
        from safetensors.torch import save_file

        tensors = {
            key: value
            for name, (layer, one) in layers.items()
            for key, value in packed(name, layer, one).items()
        }
        tensors |= {name: value.cpu().contiguous() for name, value in (replaced or {}).items()}
        journal = Journal(self._journal.path / unit)
        ready = _event(layers)
        state = {"layers": rows, "replaced": sorted(replaced or {})}
        self._settle()

        def write(folder: Path) -> None:
            if ready is not None:
                ready.synchronize()
            save_file(tensors, folder / _FILE)

        self._writing = self._writer.submit(journal.commit, 1, write, state)
        if not self._behind:
            self._settle()
        self._keep(journal.path / "ckpt-1" / FILES, state)

    def _settle(self) -> None:
        """Wait for the unit that is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            EnvironmentFault: the disk is full or refuses.
        """
        self._settle()
        self._writer.shutdown()

    def _keep(self, folder: Path, state: dict[str, Any]) -> None:
        self.rows += state["layers"]
        self.replaced |= set(state["replaced"])
        for name in [row["name"] for row in state["layers"]]:
            self._where[name] = folder / _FILE
        for name in state["replaced"]:
            self._where[name.rpartition(".")[0]] = folder / _FILE

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def load(self, key: str) -> torch.Tensor:
        """One packed tensor, such as ``model.layers.0.mlp.down_proj.qweight``."""
        from safetensors import safe_open

        with safe_open(self._where[key.rpartition(".")[0]], framework="pt") as file:
            return file.get_tensor(key)

    def expanded(self, name: str, layer: Layer, columns: int) -> torch.Tensor:
        """What a finished layer stands for, float32 (rows, columns)."""
        from olive.models.quantised import expand

        parts = {part: self.load(f"{name}.{part}") for part in ("qweight", "scales")}
        zeros = None if layer.symmetric else self.load(f"{name}.qzeros")
        return expand(layer, parts["qweight"], parts["scales"], zeros, columns)


def packed(name: str, layer: Layer, one: Quantised) -> dict[str, torch.Tensor]:
    """The tensors that a quantised layer is stored as."""
    from olive.quantization.packing import pack

    found = {
        f"{name}.qweight": _on_host(pack(one.codes, layer.bits)),
        f"{name}.scales": _on_host(one.scales),
    }
    if one.zeros is not None:
        found[f"{name}.qzeros"] = _on_host(pack(one.zeros, layer.bits))
    return found


def _event(layers: Mapping[str, tuple[Layer, Quantised]]) -> torch.cuda.Event | None:
    """Passed when the GPU has made and copied the layers; None where no GPU makes them."""
    import torch

    if not any(one.codes.is_cuda for _, one in layers.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _on_host(value: torch.Tensor) -> torch.Tensor:
    """The tensor in the host's memory; of one on a GPU not before the GPU has come so far."""
    import torch

    if not value.is_cuda:
        return value.contiguous()
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def layout(name: str, layer: Layer, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of ``packed``, for a layer of (rows, columns)."""
    blocks = layer.block_count(columns)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.qweight": ("U8", (rows, columns * layer.bits // 8)),
        f"{name}.scales": ("F32", (rows, blocks)),
    }
    if not layer.symmetric:
        found[f"{name}.qzeros"] = ("U8", (rows, -(-blocks * layer.bits // 8)))
    return found
