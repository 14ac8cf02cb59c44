"""compressed-tensors, the format of llm-compressor (``quant_method: compressed-tensors``).

pack-quantized: ``weight_packed`` int32 (outputs, inputs x bits / 32), codes with 2^(bits - 1) added, low bits
first; ``weight_scale`` (outputs, blocks); asymmetric: ``weight_zero_point`` int32, packed the same way down
the outputs. int-quantized: ``weight`` int8 (outputs, inputs), ``weight_zero_point`` int8 (outputs, blocks).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from olive.errors import ConfigError
from olive.models.foreign.gptq import act_order
from olive.models.foreign.view import Load, Part, View, expect, grouping, need
from olive.models.quantised import Layer
from olive.models.tensors import Tensors

if TYPE_CHECKING:
    import torch

_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_SUFFIXES = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale")
_FLOATS = ("F32", "F16", "BF16")
_AGAIN = "Copy or download the model again."
_OTHER = "Use a checkpoint whose weights are pack-quantized or int-quantized integers, or in floating point."


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One layer.

    Attributes:
        name: of the layer.
        bits: of a code.
        packed: ``weight_packed``, else int8.
        symmetric: no zero points.
        columns, rows: inputs, outputs.
        blocks: stored scales of a row.
        cut: blocks of ours that one stored block gives.
        indexed: there is a ``weight_g_idx``.
    """

    name: str
    bits: int
    packed: bool
    symmetric: bool
    columns: int
    rows: int
    blocks: int
    cut: int
    indexed: bool

    @property
    def ours(self) -> Layer:
        return Layer(self.bits, self.columns // self.blocks // self.cut, self.symmetric)

    def qweight(self, load: Load) -> torch.Tensor:
        import torch

        from olive.quantization.layouts import as_bytes

        if self.packed:
            return as_bytes(load(f"{self.name}.weight_packed"))
        return load(f"{self.name}.weight").view(torch.uint8) ^ 128  # plus 128, modulo 256

    def scales(self, load: Load) -> torch.Tensor:
        return self._blocks(load(f"{self.name}.weight_scale"), load)

    def qzeros(self, load: Load) -> torch.Tensor:
        import torch

        from olive.quantization import layouts
        from olive.quantization.packing import pack, unpack

        stored = load(f"{self.name}.weight_zero_point")
        if self.packed:  # words down the outputs
            codes = unpack(layouts.words_down(stored), self.bits, self.rows).T.contiguous()
        else:
            codes = stored.view(torch.uint8) ^ 128
        return pack(self._blocks(codes, load), self.bits)

    def _blocks(self, values: torch.Tensor, load: Load) -> torch.Tensor:
        from olive.quantization.layouts import block_order

        values = values.reshape(-1, self.blocks).expand(self.rows, self.blocks)
        if self.indexed:
            try:
                order = block_order(load(f"{self.name}.weight_g_idx"), self.columns // self.blocks)
            except ValueError as error:
                raise act_order(self.name) from error
            if order is not None:
                values = values[:, order]
        return (values.repeat_interleave(self.cut, 1) if self.cut > 1 else values).contiguous()


def view(config: Mapping[str, Any], stored: Tensors) -> View:
    """A compressed-tensors folder in our layout, by config and headers.

    Raises:
        ConfigError: weights that are no integers on a uniform grid, or headers that do not fit.
    """
    given = config["quantization_config"]
    groups = _groups(given)
    found = View()
    for name in stored:
        layer, _, last = name.rpartition(".")
        if last == "weight_packed" or (last == "weight" and f"{layer}.weight_scale" in stored):
            _add(found, _matrix(layer, groups, stored), name, stored)
        elif not name.endswith((*_SUFFIXES, *_ACTIVATIONS)):
            found.keep(name, stored)
    if not found.layers:
        raise ConfigError("quantization_config says compressed-tensors, and no layer has a scale", fix=_AGAIN)
    if any(group.get("input_activations") for group in groups):
        found.notes.append("its quantisation of activations is left out: weights alone are taken over")
    if any(name.endswith((".k_scale", ".v_scale")) for name in stored):
        found.notes.append("its scales of the key-value cache are left out")
    return found


def _groups(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    form = str(given.get("format", ""))
    status = str(given.get("quantization_status", "compressed"))
    groups = list((given.get("config_groups") or {}).values())
    forms = {str(group.get("format") or form) for group in groups} or {form}
    if status != "compressed" or given.get("sparsity_config", {}).get("format", "dense") != "dense":
        raise ConfigError(
            f"quantization_config says compressed-tensors, status {status}, with sparsity "
            f"{given.get('sparsity_config')}: read here are compressed, dense ones",
            fix=_OTHER,
        )
    for one in sorted(forms - set(_FORMATS)):
        raise ConfigError(
            f"quantization_config says compressed-tensors with format {one!r}, which is not read here",
            where="input_model",
            fix=_OTHER,
        )
    for group in groups:
        weights = group.get("weights") or {}
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in (2, 4, 8):
            raise ConfigError(
                f"quantization_config has weights of type {weights.get('type')} with "
                f"{weights.get('num_bits')} bits; integers of 2, 4 and 8 are read here",
                where="input_model",
                fix=_OTHER,
            )
    if not groups:
        raise ConfigError("quantization_config has no config_groups", fix=_AGAIN)
    return groups


def _scheme(layer: str, groups: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The scheme of a layer: by its name or a pattern, else the group for the class Linear."""
    for group in groups:
        for target in group.get("targets") or ():
            pattern = str(target)
            if (pattern.startswith("re:") and re.match(pattern[3:], layer)) or pattern == layer:
                return group["weights"]
    for group in groups:
        if "Linear" in (group.get("targets") or ()):
            return group["weights"]
    raise ConfigError(f"no group of quantization_config names {layer} or Linear", fix=_AGAIN)


def _matrix(name: str, groups: list[Mapping[str, Any]], stored: Tensors) -> _Matrix:
    scheme = _scheme(name, groups)
    bits, symmetric = int(scheme["num_bits"]), bool(scheme.get("symmetric", True))
    packed = f"{name}.weight_packed" in stored
    code, shape = need(stored, f"{name}.weight_packed" if packed else f"{name}.weight")
    if code != ("I32" if packed else "I8") or len(shape) != 2 or (not packed and bits != 8):
        raise ConfigError(f"the weight of {name} is {code} {shape} for {bits} bits", fix=_AGAIN)
    rows, columns = shape[0], shape[1] * 32 // bits if packed else shape[1]
    scale_code, of_scales = need(stored, f"{name}.weight_scale")
    blocks = of_scales[1] if len(of_scales) == 2 else 1
    if scale_code not in _FLOATS or of_scales not in ((rows, blocks), (1,), (), (1, 1), (rows,)):
        raise ConfigError(f"{name} has scales {scale_code} {of_scales} for {rows} rows", fix=_AGAIN)
    cut = grouping(columns, blocks, name)[1]
    if not symmetric:
        if packed:
            expect(stored, f"{name}.weight_zero_point", "I32", (-(-rows * bits // 32), blocks))
        elif need(stored, f"{name}.weight_zero_point") != ("I8", of_scales):
            raise ConfigError(f"{name} has zero points that do not fit its scales {of_scales}", fix=_AGAIN)
    indexed = f"{name}.weight_g_idx" in stored
    if indexed:
        expect(stored, f"{name}.weight_g_idx", "I32", (columns,))
    return _Matrix(name, bits, packed, symmetric, columns, rows, blocks, cut, indexed)


def _add(found: View, matrix: _Matrix, source: str, stored: Tensors) -> None:
    ours, name = matrix.ours, matrix.name
    blocks = ours.block_count(matrix.columns)
    found.layers[name] = ours
    shape = (matrix.rows, matrix.columns * ours.bits // 8)
    found.parts[f"{name}.qweight"] = Part(("U8", shape), source, matrix.qweight)
    found.parts[f"{name}.scales"] = Part(
        (stored[f"{name}.weight_scale"][0], (matrix.rows, blocks)), f"{name}.weight_scale", matrix.scales
    )
    if not ours.symmetric:
        zeros = (matrix.rows, -(-blocks * ours.bits // 8))
        found.parts[f"{name}.qzeros"] = Part(("U8", zeros), f"{name}.weight_zero_point", matrix.qzeros)
