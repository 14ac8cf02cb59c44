"""Headers of safetensors files: names, dtypes and shapes, without reading a weight.

The format: 8 bytes of little-endian header length, a JSON header, then the data without holes.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.errors import ConfigError, UntrustedInput

Tensors = dict[str, tuple[str, tuple[int, ...]]]

INDEX = "model.safetensors.index.json"
_AGAIN = "Copy or download the model again."
_PLAIN = re.compile(r"[^/\\:]+\.safetensors")
_MAX_HEADER = 100_000_000  # as the reference implementation
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def read_header(path: Path) -> Tensors:
    """Tensor name -> (dtype, shape) of one file, held against the file's size.

    Raises:
        UntrustedInput: the file is truncated, or its header is malformed.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _truncated(path, size, 8)
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_HEADER:
            raise _malformed(path, f"its header claims {length:,} bytes")
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, size, 8 + length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise _malformed(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return _check_layout(path, header, size - 8 - length)


def _check_layout(path: Path, header: dict[str, Any], available: int) -> Tensors:
    """Every tensor where the one before ends, as long as its shape says, up to the end of the file."""
    tensors: Tensors = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            bits = _BITS[dtype]
            if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
                raise TypeError("a shape or an offset is no natural number")
            for number in shape:
                bits *= number
            if bits != 8 * (end - begin):
                raise ValueError("its offsets do not fit its shape")
        except (KeyError, TypeError, ValueError) as error:
            raise _malformed(path, f"the entry of tensor {name[:80]!r} is wrong ({error})") from error
        tensors[name] = (dtype, shape)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _malformed(path, f"tensor {name[:80]!r} overlaps another or leaves a hole")
        position = end
    if position > available:
        raise _truncated(path, available, position)
    if position < available:
        raise _malformed(path, f"{available - position:,} bytes follow its last tensor")
    return tensors


def _truncated(path: Path, size: int, wanted: int) -> UntrustedInput:
    return UntrustedInput(
        f"{path} is truncated: {wanted:,} bytes are announced, {size:,} are there",
        fix=_AGAIN,
    )


def _malformed(path: Path, what: str) -> UntrustedInput:
    return UntrustedInput(f"{path} is no sound safetensors file: {what}", fix=_AGAIN)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order of name; empty when there are none.

    With an index these are exactly the files it names.

    Raises:
        ConfigError: a file that the index names is missing.
        UntrustedInput: the index is unreadable or names a file outside the folder.
    """
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    names = sorted(set(_weight_map(index).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(names)} files its index names: {', '.join(missing[:3])}",
            fix=_AGAIN,
        )
    return [folder / name for name in names]


def read_tensors(folder: Path) -> Tensors:
    """Tensor name -> (dtype, shape) of a whole model folder; empty when it has no safetensors file.

    Raises:
        ConfigError: a weight file is missing.
        UntrustedInput: a file is truncated or malformed, or the index does not fit the files.
    """
    tensors: Tensors = {}
    for path in weight_files(folder):
        tensors |= read_header(path)
    if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        absent = sorted(_weight_map(folder / INDEX).keys() - tensors.keys())
        if absent:
            raise UntrustedInput(
                f"{folder / INDEX} names {len(absent)} tensors that no file holds: {absent[0][:80]!r}",
                fix=_AGAIN,
            )
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(names.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UntrustedInput(f"{index} is unreadable: {error}", fix=_AGAIN) from error
    for name in pairs.values():
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise UntrustedInput(
                f"{index} names {name!r}, which is no safetensors file of this folder",
                fix="Use an index as `save_pretrained` writes it.",
            )
    return pairs
