"""A model stored as integers, laid out for the builder, which then copies them into its graph as they are.

The builder reads Olive's layout, in files of one matrix a projection: rows of a fused qkv or gate and up are
cut apart here, which moves no bit inside a row. It expects zero points everywhere, and gives the scales of a
head that is also the embedding one dimension where the operator that looks rows up wants two; both are made
good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed, Problem
from olive.models.hf import copy_tokenizer, open_model
from olive.models.quantised import EMBEDDING, HEAD, METHOD, Layer, layer_of, method_of
from olive.models.stream import LazyTensors, write
from olive.models.tensors import INDEX

if TYPE_CHECKING:
    import torch

_WHERE = "ModelBuilder"
_FUSED = ("qkv_proj", "gate_up_proj")

# path of a file of tensors -> what it holds
Files = Callable[[str], "dict[str, torch.Tensor]"]


def stored_as_integers(folder: Path) -> bool:
    """Whether the weights of a model folder are integers in our layout."""
    return method_of(open_model(folder)[1]) == METHOD


def check_precision(precision: str) -> list[Problem]:
    """Whether an export in ``precision`` keeps integers."""
    if precision in ("int4", "int8"):
        return []
    return [
        Problem(
            f"the model is stored as integers, and precision {precision} would undo that",
            where="precision",
            fix="Use int4 (or int8), or leave the quantising pass out.",
        )
    ]


def check(folder: Path, precision: str) -> None:
    """Refuse what the builder cannot take over.

    Raises:
        PassFailed: a precision without integers, or layers it has no operator for.
    """
    tensors, config = open_model(folder)
    if problems := check_precision(precision):
        raise PassFailed(problems=problems)
    for name in (name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        if (group := layer_of(config, name).group_size) < 16 or group & (group - 1):
            raise PassFailed(
                f"{name} shares a scale among {'a whole row' if group == -1 else group}: no operator of ONNX "
                "Runtime reads that",
                where=_WHERE,
                fix="Quantise with group_size 16, 32, 64, 128 or 256.",
            )
    left = [
        name
        for name, (_, shape) in tensors.layout.items()
        if len(shape) == 2 and name.endswith(".weight") and ".layers." in name and "router" not in name
    ]
    if left:
        raise PassFailed(
            f"{left[0].removesuffix('.weight')} stays in floating point among layers of integers, which the "
            "builder cannot export",
            where=_WHERE,
            fix='Give it 8 bits with "overrides" instead of modules_to_not_convert.',
        )


@contextmanager
def prepared(folder: Path, scratch: Path) -> Iterator[tuple[Path, Files]]:
    """A folder that the builder reads, and what it finds in the folder's files: the same model, mapped.

    Integers of another tool's format are laid out in files first: they are not stored as they are needed.
    """
    from safetensors.torch import load_file, save_file

    scratch.mkdir(parents=True)
    opened, config = open_model(folder)
    sizes = _sizes(config)
    overrides: dict[str, Any] = {}
    own = (".safetensors", ".gguf"), ("config.json", INDEX)
    for path in folder.iterdir():
        if path.suffix not in own[0] and path.name not in own[1]:
            (scratch / path.name).symlink_to(path.resolve())
    for name, override in (config["quantization_config"].get("overrides") or {}).items():
        for part in _split_names(name):
            overrides[part] = override
    config["quantization_config"]["overrides"] = overrides or None
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    files = {f"part-{number}.safetensors": names for number, names in enumerate(opened.by_file.values())}
    with opened as tensors:

        def read(name: str) -> dict[str, torch.Tensor]:
            return _file(files[Path(name).name], tensors, config, sizes)

        for name in files:
            if foreign(folder):
                save_file(read(name), scratch / name)
            else:
                (scratch / name).touch()
        yield scratch, load_file if foreign(folder) else read


def _file(
    names: list[str], tensors: LazyTensors, config: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The tensors of a file as the builder wants them; views where the file holds them so."""
    made: dict[str, torch.Tensor] = {}
    for name in names:
        made |= dict(_parts(name, tensors[name], sizes))
        if name.endswith(".qweight"):
            made |= _with_zeros(name.removesuffix(".qweight"), tensors, config, sizes)
    return made


def foreign(folder: Path) -> bool:
    """Whether another tool stored the model, in a form that the builder would not read as we do."""
    return type(open_model(folder)[0]) is not LazyTensors


@contextmanager
def expanded(folder: Path, scratch: Path) -> Iterator[Path]:
    """A folder of safetensors in floating point; the same model, one tensor in memory at a time."""
    scratch.mkdir(parents=True)
    tensors, config = open_model(folder)
    table: dict[str, str] = {}
    with tensors:
        for file, names in tensors.by_file.items():
            write(scratch / file, {name: tensors.layout[name] for name in names}, tensors.__getitem__)
            table |= dict.fromkeys(names, file)
    if len(tensors.by_file) > 1:
        index = {"metadata": {}, "weight_map": table}
        (scratch / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (scratch / "config.json").write_text(json.dumps(config), encoding="utf-8")
    copy_tokenizer(folder, scratch)
    given = folder / "generation_config.json"
    if given.is_file():
        (scratch / given.name).write_bytes(given.read_bytes())
    yield scratch


def _sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Rows of each part of a fused matrix."""
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    shared = int(config.get("num_key_value_heads") or heads)
    inner = int(config.get("intermediate_size") or 0)
    return {"qkv_proj": (heads * size, shared * size, shared * size), "gate_up_proj": (inner, inner)}


def _split_names(name: str) -> list[str]:
    prefix, _, last = name.rpartition(".")
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    return [f"{prefix}.{part}" for part in parts[last]] if last in parts else [name]


def _parts(
    name: str, value: torch.Tensor, sizes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor, or the tensors that rows of a fused one belong to."""
    layer, _, kind = name.rpartition(".")
    last = layer.rpartition(".")[2]
    if last not in _FUSED:
        yield name, value.contiguous()
        return
    for part, rows in zip(_split_names(layer), value.split(list(sizes[last])), strict=True):
        yield f"{part}.{kind}", rows.contiguous()


def _with_zeros(
    layer: str, tensors: LazyTensors, config: Mapping[str, Any], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The middle code as zero points of a layer that has none."""
    if f"{layer}.qzeros" in tensors:
        return {}
    import torch

    from olive.quantization.packing import pack

    stored: Layer = layer_of(config, layer)
    rows, blocks = tensors.shape(f"{layer}.scales")
    zeros = pack(torch.full((rows, blocks), stored.grid.middle, dtype=torch.uint8), stored.bits)
    return dict(_parts(f"{layer}.qzeros", zeros, sizes))


def finish_head(folder: Path, source: Path) -> None:
    """Give the scales and zero points of a head that is also the embedding their two dimensions.

    The bytes stay; only the header of the graph changes.
    """
    tensors, _ = open_model(source)
    if f"{HEAD}.qweight" not in tensors or f"{EMBEDDING}.weight" in tensors:
        return
    import onnx

    path = folder / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    rows = tensors.shape(f"{HEAD}.scales")[0]
    for value in graph.graph.initializer:
        if (
            value.name in ("lm_head.MatMulNBits.scales", "lm_head.MatMulNBits.qzeros")
            and len(value.dims) == 1
        ):
            columns = value.dims[0] // rows
            del value.dims[:]
            value.dims.extend((rows, columns))
    for value in graph.graph.value_info:
        if value.name in ("lm_head.MatMulNBits.scales", "lm_head.MatMulNBits.qzeros"):
            value.type.tensor_type.ClearField("shape")
    onnx.save(graph, path)
