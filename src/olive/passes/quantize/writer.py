"""The folder of a quantised model, streamed from the original and the finished layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from olive.models.hf import finish_folder, read_json
from olive.models.quantised import EMBEDDING, HEAD, Layer, settings
from olive.models.stream import Layout, LazyTensors, write
from olive.models.tensors import INDEX
from olive.passes.quantize.shelf import Shelf, layout

if TYPE_CHECKING:
    import torch

_TOGETHER = 4  # files written at once


def write_folder(
    source: Path,
    tensors: LazyTensors,
    chosen: Mapping[str, Layer],
    default: Layer,
    shelf: Shelf,
    out: Path,
) -> int:
    """Write weights, config and tokenizer; returns the bytes of all tensors.

    Args:
        source: folder of the original model.
        tensors: its weights, open.
        chosen: layers that were quantised, and how.
        default: what holds for a layer without settings of its own.
        shelf: their packed tensors.
        out: an empty folder.
    """
    shared = HEAD in chosen and f"{HEAD}.weight" not in tensors
    plan: dict[str, dict[str, Layout]] = {}
    for file, names in tensors.by_file.items():
        planned: dict[str, Layout] = {}
        for name in names:
            layer = HEAD if shared and name == f"{EMBEDDING}.weight" else name.removesuffix(".weight")
            if layer in chosen:
                planned |= layout(layer, chosen[layer], *tensors.shape(name))
            elif name in shelf.replaced:
                planned[name] = ("F32", tensors.shape(name))
            else:
                planned[name] = tensors.layout[name]
        plan[file] = planned

    def load(name: str) -> torch.Tensor:
        plain = name in tensors and name not in shelf.replaced
        return tensors[name] if plain else shelf.load(name)

    with ThreadPoolExecutor(min(_TOGETHER, len(plan))) as pool:
        total = sum(pool.map(lambda file: write(out / file, plan[file], load), plan))
    table = {name: file for file, planned in plan.items() for name in planned}
    if len(tensors.by_file) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = read_json(source / "config.json")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    finish_folder(out, source)
    config = read_json(out / "config.json")
    config["quantization_config"] = settings(default, chosen, head=HEAD in chosen, tied=shared)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total
