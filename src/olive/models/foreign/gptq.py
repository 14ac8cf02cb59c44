"""GPTQ as AutoGPTQ and GPTQModel store it (``quant_method: gptq``), and AWQ as AutoAWQ does (``awq``).

GPTQ: ``qweight`` int32 (inputs x bits / 32, outputs), ``qzeros`` int32 (blocks, outputs x bits / 32),
``scales`` (blocks, outputs), ``g_idx`` int32 (inputs,). The first version stores zero points less 1. AWQ
(version gemm): ``qweight`` int32 (inputs, outputs / 8), the rest likewise, without ``g_idx``; zero points as
they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError
from olive.models.foreign.view import Load, Part, View, expect, grouping, need
from olive.models.quantised import Layer
from olive.models.tensors import Tensors

if TYPE_CHECKING:
    import torch

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_FLOATS = ("F32", "F16", "BF16")
_AGAIN = "Copy or download the model again."
_OTHER = "Use a checkpoint in the format gptq, gptq_v2, awq (gemm), compressed-tensors, or in floating point."


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One layer, and how it is cut into blocks.

    Attributes:
        name: of the layer.
        awq: AWQ's layout, else GPTQ's.
        bits: of a stored code.
        less_one: zero points are stored less 1.
        symmetric: stored zero points are the middle code, and left out here.
        columns, rows: inputs, outputs.
        width: weights of a stored block.
        cut: blocks of ours that one stored block gives.
        indexed: there is a ``g_idx``.
    """

    name: str
    awq: bool
    bits: int
    less_one: bool
    symmetric: bool
    columns: int
    rows: int
    width: int
    cut: int
    indexed: bool

    @property
    def ours(self) -> Layer:
        """How it is stored in our layout; 3-bit codes become 4-bit ones of the same value."""
        wide = 4 if self.bits == 3 else self.bits
        return Layer(wide, self.width // self.cut, self.symmetric and wide == self.bits)

    def qweight(self, load: Load) -> torch.Tensor:
        from olive.quantization import layouts
        from olive.quantization.packing import pack, unpack

        words = load(f"{self.name}.qweight")
        if self.awq:
            return layouts.awq_bytes(words)
        packed = layouts.words_down(words)
        return pack(unpack(packed, 3, self.columns), 4) if self.bits == 3 else packed

    def scales(self, load: Load) -> torch.Tensor:
        if self.symmetric:
            self._check_middle(load)
        return self._blocks(load(f"{self.name}.scales"), load)

    def qzeros(self, load: Load) -> torch.Tensor:
        from olive.quantization.packing import pack

        return pack(self._blocks(self._zeros(load), load), self.ours.bits)

    def _zeros(self, load: Load) -> torch.Tensor:
        """Zero points, uint8 (stored blocks, rows)."""
        from olive.quantization import layouts

        words = load(f"{self.name}.qzeros")
        if self.awq:
            return layouts.awq_codes(words)
        codes = layouts.words_across(words, self.bits, self.rows)
        return layouts.plus_one(codes, self.bits) if self.less_one else codes

    def _check_middle(self, load: Load) -> None:
        middle = 2 ** (self.bits - 1)
        zeros = self._zeros(load)
        if not bool((zeros == middle).all()):
            raise ConfigError(
                f"quantization_config says sym, and zero points of {self.name} reach from {int(zeros.min())} "
                f"to {int(zeros.max())}, not {middle} throughout",
                fix="Set sym: false in its config.json; if all are one off, checkpoint_format is the other "
                "of gptq and gptq_v2.",
            )

    def _blocks(self, values: torch.Tensor, load: Load) -> torch.Tensor:
        """(stored blocks, rows) as (rows, our blocks)."""
        from olive.quantization.layouts import block_order

        if self.indexed:
            try:
                order = block_order(load(f"{self.name}.g_idx"), self.width)
            except ValueError as error:
                raise act_order(self.name) from error
            if order is not None:
                values = values[order]
        values = values.T
        if self.cut > 1:
            values = values.repeat_interleave(self.cut, 1)
        return values.contiguous()


def act_order(name: str) -> ConfigError:
    """A layer whose groups are scattered over its inputs."""
    return ConfigError(
        f"{name} has an activation order (desc_act, g_idx): inputs of a group do not lie together, and no "
        "operator of ONNX Runtime reads that",
        fix="Use a checkpoint made with desc_act: false (static_groups keeps most of its gain), or the model "
        "in floating point and Gptq.",
    )


def view(folder: Path, config: Mapping[str, Any], stored: Tensors) -> View:
    """A GPTQ or AWQ folder in our layout, by config and headers.

    Raises:
        ConfigError: a version that is not read here, a header that does not fit, or an activation order.
    """
    given = config["quantization_config"]
    awq = str(given.get("quant_method")) == "awq"
    _check_version(given, awq)
    found = View()
    for name in stored:
        if name.endswith(".qweight"):
            matrix = _matrix(name.removesuffix(".qweight"), given, awq, stored)
            _add(found, matrix, stored)
        elif not name.endswith(_PARTS):
            found.keep(name, stored)
    if not found.layers:
        raise ConfigError("quantization_config says gptq or awq, and no layer has a qweight", fix=_AGAIN)
    if given.get("desc_act"):
        _check_order(folder, [name for name in found.layers if f"{name}.g_idx" in stored], given, stored)
    if any(_bits(given, name) == 3 for name in found.layers):
        found.notes.append("3-bit codes are kept as 4-bit codes of the same values: no kernel reads 3 bits")
    return found


def _add(found: View, matrix: _Matrix, stored: Tensors) -> None:
    ours, name = matrix.ours, matrix.name
    blocks = ours.block_count(matrix.columns)
    code = need(stored, f"{name}.scales")[0]
    found.layers[name] = ours
    found.parts[f"{name}.qweight"] = Part(
        ("U8", (matrix.rows, matrix.columns * ours.bits // 8)), f"{name}.qweight", matrix.qweight
    )
    found.parts[f"{name}.scales"] = Part((code, (matrix.rows, blocks)), f"{name}.scales", matrix.scales)
    if not ours.symmetric:
        shape = (matrix.rows, -(-blocks * ours.bits // 8))
        found.parts[f"{name}.qzeros"] = Part(("U8", shape), f"{name}.qzeros", matrix.qzeros)


def _matrix(name: str, given: Mapping[str, Any], awq: bool, stored: Tensors) -> _Matrix:
    bits = _bits(given, name)
    shape = need(stored, f"{name}.qweight")[1]
    code, of_scales = need(stored, f"{name}.scales")
    if len(shape) != 2 or len(of_scales) != 2 or code not in _FLOATS:
        raise ConfigError(f"{name} has a qweight {shape} and scales {code} {of_scales}", fix=_AGAIN)
    columns, rows = (shape[0], shape[1] * 8) if awq else (shape[0] * 32 // bits, shape[1])
    blocks = of_scales[0]
    group = int(_setting(given, name, "group_size", "q_group_size"))
    width = columns if group == -1 else group
    expect(stored, f"{name}.qweight", "I32", (columns, rows // 8) if awq else (columns * bits // 32, rows))
    if width < 1 or columns % width:
        raise ConfigError(
            f"rows of {name} have {columns} weights, which blocks of {width} do not divide", fix=_OTHER
        )
    if blocks != columns // width or of_scales[1] != rows:
        raise ConfigError(
            f"{name} has scales {of_scales}, and {columns} x {rows} weights in blocks of {width} need "
            f"{(columns // width, rows)}",
            fix="The file is damaged, or quantization_config describes another model.",
        )
    expect(stored, f"{name}.qzeros", "I32", (blocks, rows * bits // 32))
    indexed = f"{name}.g_idx" in stored and not awq
    if indexed:
        expect(stored, f"{name}.g_idx", "I32", (columns,))
    return _Matrix(
        name=name,
        awq=awq,
        bits=bits,
        less_one=not awq and given.get("checkpoint_format", given.get("format", "gptq")) != "gptq_v2",
        symmetric=not awq and bool(_setting(given, name, "sym", default=False)),
        columns=columns,
        rows=rows,
        width=width,
        cut=grouping(columns, blocks, name)[1],
        indexed=indexed,
    )


def _check_version(given: Mapping[str, Any], awq: bool) -> None:
    """Refuse what only looks like the formats read here."""
    wrong: tuple[str, Any] | None = None
    if awq:
        version = str(given.get("version", "gemm")).lower()
        if version != "gemm":
            wrong = "version", version
        elif not given.get("zero_point", True):
            wrong = "zero_point", False
        elif _integer(given, "bits", "w_bit") != 4:
            wrong = "bits", given.get("bits", given.get("w_bit"))
    else:
        form = str(given.get("checkpoint_format") or given.get("format") or "gptq")
        if form not in ("gptq", "gptq_v2"):
            wrong = "checkpoint_format", form
        elif given.get("is_marlin_format"):
            wrong = "is_marlin_format", True
        elif str(given.get("pack_dtype", "int32")) not in ("int32", "torch.int32"):
            wrong = "pack_dtype", given["pack_dtype"]
        elif _integer(given, "bits") not in (2, 3, 4, 8):
            wrong = "bits", given["bits"]
    if wrong is not None:
        raise ConfigError(
            f"quantization_config says {'awq' if awq else 'gptq'} with {wrong[0]} {wrong[1]!r}, which is not "
            "read here",
            where="input_model",
            fix=_OTHER,
        )


def _bits(given: Mapping[str, Any], name: str) -> int:
    bits = int(_setting(given, name, "bits", "w_bit"))
    if bits not in (2, 3, 4, 8):
        raise ConfigError(f"{name} has {bits} bits; 2, 3, 4 and 8 are read here", fix=_OTHER)
    return bits


def _setting(given: Mapping[str, Any], name: str, *keys: str, default: Any = None) -> Any:
    """A setting of one layer; ``dynamic`` of GPTQModel changes it for names that match a pattern."""
    for pattern, changes in (given.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            for key in keys:
                if key in changes:
                    return changes[key]
            break
    for key in keys:
        if given.get(key) is not None:
            return given[key]
    if default is not None:
        return default
    raise ConfigError(f"quantization_config has no {keys[0]}", fix=_AGAIN)


def _integer(given: Mapping[str, Any], *keys: str) -> int:
    value = _setting(given, "", *keys)
    if not isinstance(value, int):
        raise ConfigError(f"quantization_config has {keys[0]} {value!r}, no whole number", fix=_AGAIN)
    return value


def _check_order(folder: Path, names: list[str], given: Mapping[str, Any], stored: Tensors) -> None:
    """With ``desc_act`` read every ``g_idx`` now, a few kilobytes a layer, not in the middle of a run."""
    from safetensors import safe_open

    from olive.models.tensors import read_header, weight_files

    for path in weight_files(folder):
        here = read_header(path)
        with safe_open(path, framework="numpy") as file:
            for name in names:
                if f"{name}.g_idx" not in here:
                    continue
                index = file.get_tensor(f"{name}.g_idx")
                group = int(_setting(given, name, "group_size", "q_group_size"))
                width = prod(stored[f"{name}.g_idx"][1]) if group == -1 else group
                blocks = index.reshape(-1, width)
                if not (blocks == blocks[:, :1]).all():
                    raise act_order(name)
