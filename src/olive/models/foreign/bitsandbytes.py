"""bitsandbytes' 4-bit weights (``quant_method: bitsandbytes``), expanded to what they stand for.

``weight`` uint8 (n / 2, 1), the earlier code in the high half; ``weight.absmax`` one scale a block of the
flat matrix; ``weight.quant_map`` the 16 values of NF4 or FP4. With double quantisation ``absmax`` is a code
of ``nested_quant_map``, times ``nested_absmax``, plus an offset. No uniform grid has these values, so they
become floating point, in the dtype bitsandbytes computes with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError, UntrustedInput
from olive.models.foreign.view import Load, Part, View, need
from olive.models.tensors import Tensors, read_header, weight_files

if TYPE_CHECKING:
    import torch

_STATE = ".weight.quant_state.bitsandbytes__"
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_AGAIN = "Copy or download the model again."


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One layer: its name, shape, dtype, weights of a block, and the same of the scales."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int
    nested_offset: float

    def weight(self, load: Load) -> torch.Tensor:
        import torch

        place = f"{self.name}.weight"
        absmax = load(f"{place}.absmax")
        if self.nested_block:
            values = load(f"{place}.nested_quant_map")[absmax.long()]
            outer = load(f"{place}.nested_absmax").repeat_interleave(self.nested_block)[: len(values)]
            absmax = values * outer + self.nested_offset
        codes = load(place).view(-1)
        flat = load(f"{place}.quant_map").float()[torch.stack((codes >> 4, codes & 15), -1).int()]
        flat = flat.view(-1)[: prod(self.shape)]
        scales = absmax.float().repeat_interleave(self.block)[: flat.numel()]
        return (flat * scales).to(getattr(torch, self.dtype)).view(self.shape)


def view(folder: Path, config: Mapping[str, Any], stored: Tensors) -> View:
    """A bitsandbytes folder in floating point.

    Raises:
        ConfigError: 8-bit weights, or a part is missing.
    """
    given = config["quantization_config"]
    states = {name.split(_STATE)[0]: name for name in stored if _STATE in name}
    if given.get("load_in_8bit") or not states:
        raise ConfigError(
            "the model holds bitsandbytes' 8-bit weights, which are not read here"
            if given.get("load_in_8bit")
            else "quantization_config says bitsandbytes, and no weight has its 4-bit state",
            where="input_model",
            fix="Use the model in floating point, or one in 4 bits.",
        )
    read = _states(folder, states)
    found = View()
    for name in stored:
        layer = name.removesuffix(".weight")
        if layer in states:
            matrix = _matrix(layer, read[layer], stored)
            found.parts[name] = Part((_CODES[matrix.dtype], matrix.shape), name, matrix.weight)
        elif name.partition(".weight.")[0] not in states:
            found.keep(name, stored)
    found.notes.append(
        "the model holds bitsandbytes' 4-bit weights, which lie on no uniform grid: they are expanded to the "
        "floating-point weights they stand for"
    )
    return found


def _states(folder: Path, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What each layer says of itself: a small JSON text stored as a tensor of bytes."""
    from safetensors import safe_open

    found: dict[str, dict[str, Any]] = {}
    for path in weight_files(folder):
        header = read_header(path)
        with safe_open(path, framework="numpy") as file:
            for layer, name in names.items():
                if name not in header:
                    continue
                if header[name][0] != "U8" or prod(header[name][1]) > 1 << 16:
                    raise UntrustedInput(f"{name} of {path} is no description of a weight", fix=_AGAIN)
                try:
                    found[layer] = json.loads(bytes(file.get_tensor(name)))
                except ValueError as error:
                    raise UntrustedInput(f"{name} of {path} is no JSON: {error}", fix=_AGAIN) from error
    return found


def _matrix(name: str, state: Mapping[str, Any], stored: Tensors) -> _Matrix:
    place = f"{name}.weight"
    try:
        shape = tuple(int(size) for size in state["shape"])
        dtype, block = str(state["dtype"]), int(state["blocksize"])
        nested = int(state.get("nested_blocksize") or 0)
        offset = float(state.get("nested_offset") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the 4-bit state of {name} is damaged: {error!r}", fix=_AGAIN) from error
    count = prod(shape)
    scales = -(-count // block) if block > 0 else 0
    wanted: dict[str, int] = {place: -(-count // 2), f"{place}.absmax": scales, f"{place}.quant_map": 16}
    if nested:
        wanted[f"{place}.nested_absmax"] = -(-scales // nested)
        wanted[f"{place}.nested_quant_map"] = 256
    for part, size in wanted.items():
        code, found = need(stored, part)
        if prod(found) != size or (part == place and code != "U8") or dtype not in _CODES:
            raise ConfigError(
                f"{part} is {code} {found}, and a {dtype} matrix {shape} in blocks of {block} needs {size}",
                fix=_AGAIN,
            )
    return _Matrix(name, shape, dtype, block, nested, offset)
