"""Our integers in the tensors of GPTQ, AWQ and compressed-tensors: inverse of ``olive.models.foreign``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from olive.models.quantised import Layer
from olive.models.stream import Layout

if TYPE_CHECKING:
    import torch

Format = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
Load = Callable[[str], "torch.Tensor"]
SCALES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One layer of integers.

    Attributes:
        name: of the layer.
        layer: how it is stored.
        rows, columns: outputs, inputs.
        scale: safetensors dtype that scales are written in.
    """

    name: str
    layer: Layer
    rows: int
    columns: int
    scale: str

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return self.layer.block_count(self.columns)

    def zeros(self, load: Load) -> torch.Tensor:
        """Zero points, uint8 (rows, blocks); the middle code where there are none."""
        import torch

        from olive.quantization.packing import unpack

        if self.layer.symmetric:
            return torch.full((self.rows, self.blocks), 2 ** (self.layer.bits - 1), dtype=torch.uint8)
        return unpack(load(f"{self.name}.qzeros"), self.layer.bits, self.blocks)

    def scales(self, load: Load) -> torch.Tensor:
        """Scales (rows, blocks) in the dtype they are written in."""
        import torch

        kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
        return load(f"{self.name}.scales").to(kinds[self.scale])


def problems(form: Format, layer: Layer) -> Iterator[str]:
    """Why a layer has no place in a format, by its settings."""
    if form == "awq" and (layer.bits != 4 or layer.group_size < 1):
        yield f"awq stores 4 bits in groups, not {layer.bits} bits in groups of {layer.group_size}"
    if layer.bits not in (2, 4, 8):
        yield f"{form} stores 2, 4 or 8 bits, not {layer.bits}"


def misfit(form: Format, one: Matrix) -> str | None:
    """Why a matrix has no place in a format, by its shape; words are of 32 bits."""
    bits = one.layer.bits
    if form != "awq" and one.columns * bits % 32:
        return f"rows of {one.columns} weights of {bits} bits fill no whole words"
    if form != "compressed-tensors" and one.rows * bits % 32:
        return f"{one.rows} outputs with zero points of {bits} bits fill no whole words"
    return "AWQ packs inputs by two" if form == "awq" and one.columns % 2 else None


def tensors(form: Format, one: Matrix) -> dict[str, tuple[Layout, Callable[[Load], torch.Tensor]]]:
    """Tensor name -> its header, and how to make it from ours."""
    return {"awq": _awq, "compressed-tensors": _compressed}.get(form, _gptq(form == "gptq"))(one)


Made = dict[str, tuple[Layout, Callable[["Load"], "torch.Tensor"]]]


def _gptq(less_one: bool) -> Callable[[Matrix], Made]:
    def made(one: Matrix) -> Made:
        from olive.quantization import layouts

        name, bits = one.name, one.layer.bits
        width = one.columns // one.blocks

        def zeros(load: Load) -> torch.Tensor:
            codes = one.zeros(load).T.contiguous()
            return layouts.to_words_across(layouts.less_one(codes, bits) if less_one else codes, bits)

        def index(load: Load) -> torch.Tensor:
            import torch

            return torch.arange(one.columns, dtype=torch.int32) // width

        return {
            f"{name}.qweight": (
                ("I32", (one.columns * bits // 32, one.rows)),
                lambda load: layouts.to_words_down(load(f"{name}.qweight")),
            ),
            f"{name}.qzeros": (("I32", (one.blocks, one.rows * bits // 32)), zeros),
            f"{name}.scales": ((one.scale, (one.blocks, one.rows)), lambda load: one.scales(load).T),
            f"{name}.g_idx": (("I32", (one.columns,)), index),
        }

    return made


def _awq(one: Matrix) -> Made:
    from olive.quantization import layouts

    name = one.name
    return {
        f"{name}.qweight": (
            ("I32", (one.columns, one.rows // 8)),
            lambda load: layouts.to_awq_words(load(f"{name}.qweight")),
        ),
        f"{name}.qzeros": (
            ("I32", (one.blocks, one.rows // 8)),
            lambda load: layouts.to_awq_code_words(one.zeros(load).T.contiguous()),
        ),
        f"{name}.scales": ((one.scale, (one.blocks, one.rows)), lambda load: one.scales(load).T),
    }


def _compressed(one: Matrix) -> Made:
    import torch

    from olive.quantization import layouts

    name, bits = one.name, one.layer.bits
    made: Made = {
        f"{name}.weight_packed": (
            ("I32", (one.rows, one.columns * bits // 32)),
            lambda load: layouts.as_words(load(f"{name}.qweight")),
        ),
        f"{name}.weight_scale": ((one.scale, (one.rows, one.blocks)), one.scales),
        f"{name}.weight_shape": (("I64", (2,)), lambda load: torch.tensor([one.rows, one.columns])),
    }
    if not one.layer.symmetric:
        made[f"{name}.weight_zero_point"] = (
            ("I32", (-(-one.rows * bits // 32), one.blocks)),
            lambda load: layouts.to_words_across(one.zeros(load).T.contiguous(), bits).T,
        )
    return made


def config(
    form: Format, layers: Mapping[str, Layer], floats: list[str], *, head: bool, version: str
) -> dict[str, Any]:
    """``quantization_config``.

    Args:
        form: of the folder.
        layers: every layer of integers, by name.
        floats: linear layers in floating point.
        head: the head is among the layers.
        version: of this product.
    """
    kinds = list(layers.values())
    most = max(kinds, key=kinds.count)
    if form == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": most.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": floats or None,
        }
    if form == "compressed-tensors":
        return _compressed_config(layers, floats)
    dynamic = {
        rf"+:^{name.replace('.', chr(92) + '.')}$": {"bits": layer.bits, "group_size": layer.group_size}
        for name, layer in layers.items()
        if (layer.bits, layer.group_size) != (most.bits, most.group_size)
    } | {rf"-:^{name.replace('.', chr(92) + '.')}$": {} for name in floats if name != "lm_head"}
    return {
        "quant_method": "gptq",
        "bits": most.bits,
        "group_size": most.group_size,
        "sym": all(layer.symmetric for layer in kinds),
        "desc_act": False,
        "checkpoint_format": form,
        "pack_dtype": "int32",
        "lm_head": head,
        "meta": {"quantizer": [f"olive-next:{version}"]},
    } | ({"dynamic": dynamic} if dynamic else {})


def _compressed_config(layers: Mapping[str, Layer], floats: list[str]) -> dict[str, Any]:
    named: dict[Layer, list[str]] = {}
    for name, layer in layers.items():
        named.setdefault(layer, []).append(name)
    groups = {}
    for number, (layer, names) in enumerate(named.items()):
        whole = layer.group_size == -1
        weights = {
            "num_bits": layer.bits,
            "type": "int",
            "symmetric": layer.symmetric,
            "strategy": "channel" if whole else "group",
            "group_size": None if whole else layer.group_size,
            "dynamic": False,
        }
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(named) == 1 else names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": floats,
    }
