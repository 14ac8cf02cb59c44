"""The folder of a rotated model, made tensor by tensor in float64: norms folded, weights turned. Needs torch.

With R1 on the residual stream and R2 on the values of each head of a layer: a reader becomes ``W diag(g) R1``
(g the norm's weight, which becomes ones), a writer ``R1^T W``, its bias ``R1^T b``, the embedding ``E R1``;
the values' rows of v become ``R2^T W`` head by head, the columns of o ``W R2``. The function stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from olive.config.base import Dtype
from olive.errors import PassFailed
from olive.models.hf import finish_folder, read_json
from olive.models.stream import Layout, LazyTensors, stored_code, stored_dtype, write
from olive.models.tensors import INDEX
from olive.passes.quantize.residual import Fold, Stream, untied_config
from olive.quantization.rotations import Rotation, random_hadamard, random_orthogonal

_CELLS = 8 << 20  # elements in float64 at once


@dataclass(frozen=True)
class Rotations:
    """R1 of the stream and R2 of each layer.

    Attributes:
        stream: R1, of the hidden size's order.
        heads: R2 of each decoder layer, of a head's order.
        notes: where it is not what was asked for.
    """

    stream: Rotation
    heads: Sequence[Rotation]
    notes: tuple[str, ...] = ()


def draw(stream: Stream, mode: str, seed: int) -> Rotations:
    """R1 and R2 of a model: Hadamard matrices with random signs, or random orthogonal ones.

    Where no Hadamard matrix of an order is known here, that rotation is random orthogonal; a note says so.
    """
    generator = torch.Generator().manual_seed(seed)
    notes: list[str] = []

    def one(size: int, what: str) -> Rotation:
        found = random_hadamard(size, generator) if mode == "hadamard" else None
        if found is None and mode == "hadamard" and what:
            notes.append(f"no Hadamard matrix of order {size} is known here: {what} is random orthogonal")
        return found or random_orthogonal(size, generator)

    first = one(stream.hidden, "R1")
    heads = [one(stream.head, "" if number else "R2") for number in range(stream.layers)]
    return Rotations(first, heads, tuple(notes))


def norm_factor(weight: torch.Tensor, stream: Stream) -> torch.Tensor:
    """What a norm multiplies by, float64."""
    return weight.double() + 1.0 if stream.one_plus else weight.double()


def turned(
    fold: Fold, value: torch.Tensor, norm: torch.Tensor | None, stream: Stream, by: Rotations
) -> torch.Tensor:
    """One tensor of the rotated model, computed in float64 some rows or columns at a time.

    Args:
        fold: how it is made.
        value: the original tensor.
        norm: the weight of the norm before it.
        stream: of the model.
        by: the rotations.

    Returns:
        Float32, or float64 where ``value`` is.
    """
    if fold.is_norm:
        return torch.full_like(value, 0.0 if stream.one_plus else 1.0)
    if not (fold.reads or fold.writes or fold.values):
        return value
    made = torch.empty(value.shape, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32)
    first, second = by.stream, by.heads[fold.layer] if fold.layer >= 0 else None
    if value.dim() == 1:
        entries = value.double()
        if fold.writes:
            entries = first.apply(entries)
        elif fold.values and second is not None:
            entries = entries.clone()
            entries[slice(*fold.values)] = second.apply(entries[slice(*fold.values)])
        return made.copy_(entries)
    if fold.writes:
        for columns in _pieces(value.shape[1], value.shape[0], stream.head):
            part = value[:, columns].double()
            if fold.mixes and second is not None:
                part = second.apply(part)
            made[:, columns] = first.apply(part.T.contiguous()).T
        return made
    factor = None if norm is None else norm_factor(norm, stream)
    for rows in _pieces(value.shape[0], value.shape[1], stream.head):
        part = value[rows].double()
        part = first.apply(part if factor is None else part * factor)
        if fold.values is not None and second is not None:
            start = max(fold.values[0] - rows.start, 0)
            own = part[start : max(fold.values[1] - rows.start, 0)]
            if len(own):
                own.copy_(second.apply(own.T.contiguous()).T)
        made[rows] = part
    return made


def _pieces(length: int, across: int, step: int) -> Iterator[slice]:
    """Runs of a multiple of ``step``, small enough that their copies in float64 are too."""
    size = max(1, _CELLS // max(across, 1) // step) * step
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def write_folder(
    source: Path,
    tensors: LazyTensors,
    stream: Stream,
    by: Rotations,
    dtype: Dtype,
    out: Path,
    done: Callable[[int], None],
) -> int:
    """Write the rotated model; returns the bytes of its tensors.

    Args:
        source: folder of the model.
        tensors: its weights, open.
        stream: how they are turned.
        by: the rotations.
        dtype: to store in.
        out: an empty folder.
        done: called with the number of tensors written.

    Raises:
        PassFailed: a weight is NaN or infinite.
    """
    total, count = 0, 0
    table: dict[str, str] = {}

    def load(name: str) -> torch.Tensor:
        nonlocal count
        fold = stream.folds[name]
        norm = None if fold.norm is None else tensors[fold.norm]
        made = turned(fold, tensors[fold.source], norm, stream, by)
        code = stored_code(tensors.code(fold.source), dtype)
        stored = made.to(stored_dtype(code))
        if stored.is_floating_point() and not bool(torch.stack(stored.aminmax()).isfinite().all()):
            raise PassFailed(
                f"{fold.source} has values that are NaN or infinite, or become so in {dtype}",
                fix="Look at what made this model; store the rotated one in float32.",
            )
        count += 1
        done(count)
        return stored

    by_file = {file: list(names) for file, names in tensors.by_file.items()}
    for name, fold in stream.folds.items():
        if name not in tensors:
            home = next(file for file, names in tensors.by_file.items() if fold.source in names)
            by_file[home].append(name)
    for file, names in by_file.items():
        layout: dict[str, Layout] = {}
        for name in names:
            of = stream.folds[name].source
            layout[name] = stored_code(tensors.code(of), dtype), tensors.shape(of)
        total += write(out / file, layout, load)
        table.update(dict.fromkeys(names, file))
    if len(by_file) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = untied_config(read_json(source / "config.json"), dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    finish_folder(out, source)
    return total


def folded(source: LazyTensors, stream: Stream) -> dict[str, torch.Tensor]:
    """Every tensor of the model with the norms folded and nothing turned, float32."""
    made = {}
    for name, fold in stream.folds.items():
        value = source[fold.source].double()
        if fold.is_norm:
            value = torch.full_like(value, 0.0 if stream.one_plus else 1.0)
        elif fold.norm is not None:
            value = value * norm_factor(source[fold.norm], stream)
        made[name] = value.float()
    return made
