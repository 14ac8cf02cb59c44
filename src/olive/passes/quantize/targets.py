"""Which layers are quantised, and how: told from tensor headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from olive.config.base import Frozen, PassParams
from olive.errors import Problem, Severity
from olive.models.artifact import ModelInfo
from olive.models.quantised import EMBEDDING, HEAD, Layer, format_of, layer_of
from olive.passes.quantize import kernels

Bits = Literal[2, 4, 8]
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_GROUPS = (16, 32, 64, 128, 256)
SHARED = (("q_proj", "k_proj", "v_proj"),)
CHOICE = "olive_precision.json"  # beside a model: settings by layer, of SelectiveMixedPrecision


Rung = Literal["lm_head", "down_proj", "group_size", "Gptq"]
RUNGS: tuple[Rung, ...] = ("lm_head", "down_proj", "group_size", "Gptq")


class Override(Frozen):
    """Other settings for some layers."""

    bits: Bits | None = Field(None, description="Bits of a weight.")
    group_size: int | None = Field(None, description="Weights that share a scale; -1 for a whole row.")
    symmetric: bool | None = Field(None, description="No zero points.")


class QuantizeParams(PassParams):
    """Settings of every pass that quantises weights; names of Olive 0.13."""

    bits: Bits = Field(4, description="Bits of a weight.")
    group_size: int = Field(
        32, description="Weights of a row that share a scale: 16, 32, 64, 128, 256, or -1 for a whole row."
    )
    sym: bool = Field(False, description="No zero points: half a byte less a block, and more error.")
    lm_head: bool = Field(
        False,
        description="Quantise the head too. Where it is also the embedding, both become these integers.",
    )
    embeds: bool = Field(
        False, description="Quantise the embedding. Only together with a head that is the same matrix."
    )
    overrides: dict[str, Override] = Field(
        {},
        description="Layer name, or a pattern such as `*.down_proj`, to other bits, group_size or symmetric; "
        "the last that fits counts.",
    )
    modules_to_not_convert: tuple[str, ...] = Field(
        (), description="Layer names or patterns that stay in floating point."
    )
    fallback: bool | tuple[Rung, ...] = Field(
        False,
        description="What to try, in this order and one on top of the other, when the parity gate fails: 8 "
        "bits for `lm_head`, 8 bits for `down_proj`, a smaller `group_size`, `Gptq`. true: all of them.",
    )
    fallback_data_config: str | None = Field(
        None,
        description="Data that the rung `Gptq` calibrates on. Default: the pass's own, where it has one.",
        json_schema_extra={"reference": "data_configs"},
    )


def tied(info: ModelInfo) -> bool:
    """Whether embedding and head are one matrix."""
    if f"{HEAD}.weight" in info.tensors:
        return False
    return bool(info.config.get("tie_word_embeddings", True)) and f"{EMBEDDING}.weight" in info.tensors


def number_of(name: str) -> int | None:
    """Number of the decoder layer that a tensor or module belongs to; None outside of them."""
    found = _LAYER.search(f"{name}.")
    return int(found[1]) if found else None


def chosen(info: ModelInfo, params: QuantizeParams) -> dict[str, Layer]:
    """Name of each layer to quantise -> how; in order of the decoder layers, the head last."""
    from olive.passes.quantize import precision

    found: dict[str, Layer] = {}
    choice = precision.read(info.path)
    for name, (code, shape) in info.tensors.items():
        layer = name.removesuffix(".weight")
        if layer == name or len(shape) != 2 or code not in _FLOATS or number_of(name) is None:
            continue
        if not is_router(layer) and not _fits(layer, params.modules_to_not_convert):
            found[layer] = layer_settings(layer, params, choice.get(layer))
    ordered = dict(sorted(found.items(), key=lambda item: number_of(item[0]) or 0))
    if params.lm_head and not _fits(HEAD, params.modules_to_not_convert):
        ordered[HEAD] = layer_settings(HEAD, params, choice.get(HEAD))
    return ordered


def default_settings(params: QuantizeParams) -> Layer:
    """What holds for a layer without overrides."""
    return Layer(params.bits, params.group_size, params.sym)


def layer_settings(name: str, params: QuantizeParams, choice: Override | None = None) -> Layer:
    """How one layer is quantised; ``choice`` is a pass's, which the document's overrides outrank."""
    bits, group, symmetric = params.bits, params.group_size, params.sym
    if choice is not None:
        bits, group = choice.bits or bits, choice.group_size or group
        symmetric = symmetric if choice.symmetric is None else choice.symmetric
    for pattern, override in params.overrides.items():
        if fnmatchcase(name, pattern):
            bits = override.bits or bits
            group = override.group_size or group
            symmetric = symmetric if override.symmetric is None else override.symmetric
    return Layer(bits, group, symmetric)


def is_router(layer: str) -> bool:
    """Whether a layer chooses experts: it stays as it is, since an error there sends tokens elsewhere."""
    return bool(_ROUTER.search(layer))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(info: ModelInfo, params: QuantizeParams, provider: str) -> Iterator[Problem]:
    """Everything about the choice of layers that would fail later."""
    if (method := format_of(info.config)) is not None:
        yield Problem(
            f"the model is stored quantised ({method}) already",
            fix="Use the model in floating point as input_model.",
        )
        return
    layers = chosen(info, params)
    if not layers:
        yield Problem(
            "no layer to quantise: the model has no weight matrices in numbered layers",
            fix="Check modules_to_not_convert." if params.modules_to_not_convert else "Use another model.",
        )
        return
    if not isinstance(params.fallback, bool) and "Gptq" in params.fallback:
        data = params.fallback_data_config or getattr(params, "data_config", None)
        if data is None:
            yield Problem(
                "the rung Gptq has nothing to calibrate on",
                where="fallback",
                fix="Name a fallback_data_config, or leave the rung out.",
            )
    yield from _check_head(info, params)
    yield from _check_overrides(params, [*layers, HEAD])
    yield from _check_blocks(info, layers)
    yield from _check_kernels(layers, provider)
    yield from _check_shared(layers)


def check_stored(info: ModelInfo, provider: str) -> Iterator[Problem]:
    """What would fail at the export of a model that was brought as integers."""
    names = [name.removesuffix(".qweight") for name in info.tensors if name.endswith(".qweight")]
    layers = {name: layer_of(info.config, name) for name in names}
    for name, layer in layers.items():
        if layer.group_size not in _GROUPS:
            yield Problem(
                f"{name} shares a scale among {'a row' if layer.group_size == -1 else layer.group_size}: no "
                "operator of ONNX Runtime reads that",
                where="input_model",
                fix="Use a checkpoint with a group size of 16, 32, 64, 128 or 256.",
            )
            break
    yield from _check_kernels(layers, provider)
    yield from _check_shared(layers)


def _check_head(info: ModelInfo, params: QuantizeParams) -> Iterator[Problem]:
    one = tied(info)
    if params.embeds and not (params.lm_head and one):
        yield Problem(
            "embeds needs lm_head beside it: embedding and head are one matrix"
            if one
            else "this model's embedding is a matrix of its own, which no runtime here reads quantised "
            "from a checkpoint",
            where="embeds",
            fix="Set lm_head: true too."
            if one
            else "Remove embeds; ModelBuilder's op_types_to_quantize Gather quantises it at the export.",
        )
    elif params.lm_head and one and not params.embeds:
        yield Problem(
            "embedding and head are one matrix: lm_head quantises both",
            where="lm_head",
            severity=Severity.NOTE,
        )
    if params.lm_head and not one and f"{HEAD}.weight" not in info.tensors:
        yield Problem(f"the model has no {HEAD}.weight", where="lm_head", fix="Remove lm_head.")


def _check_overrides(params: QuantizeParams, names: list[str]) -> Iterator[Problem]:
    for field, patterns in (
        ("overrides", tuple(params.overrides)),
        ("modules_to_not_convert", params.modules_to_not_convert),
    ):
        for pattern in patterns:
            known = field == "modules_to_not_convert" or any(fnmatchcase(name, pattern) for name in names)
            if not known:
                yield Problem(
                    f"no layer is called {pattern!r}",
                    where=f"{field}.{pattern}",
                    fix=f"Layers are called as {names[0]}; a pattern such as *.{names[0].rpartition('.')[2]} "
                    "takes them all.",
                )


def _check_blocks(info: ModelInfo, layers: Mapping[str, Layer]) -> Iterator[Problem]:
    bad: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        width = _width(info, name)
        group = width if layer.group_size == -1 else layer.group_size
        if layer.group_size != -1 and layer.group_size not in _GROUPS:
            yield Problem(
                f"group_size {layer.group_size} is no block of any kernel",
                where="group_size",
                fix="Use 16, 32, 64, 128, 256, or -1 for a whole row.",
            )
            return
        if width and width % group:
            bad.setdefault((width, group), name)
    for (width, group), name in bad.items():
        fitting = [str(size) for size in _GROUPS if width % size == 0]
        yield Problem(
            f"rows of {name} have {width} weights, which blocks of {group} do not divide",
            where="group_size",
            fix=(f"Use group_size {' or '.join(fitting)}" if fitting else "Leave it out")
            + f', or name it: "overrides": {{"*.{name.rpartition(".")[2]}": {{"group_size": '
            + f"{fitting[-1] if fitting else -1}}}}}.",
        )


def _check_kernels(layers: Mapping[str, Layer], provider: str) -> Iterator[Problem]:
    pairs = {(layer.bits, layer.group_size) for layer in layers.values()}
    yield from kernels.problems(pairs, provider, where="group_size")


def _check_shared(layers: Mapping[str, Layer]) -> Iterator[Problem]:
    """The export packs q, k and v into one matrix."""
    for name, layer in layers.items():
        prefix, _, last = name.rpartition(".")
        for names in SHARED:
            others = {layers.get(f"{prefix}.{other}", layer) for other in names}
            if last == names[0] and len(others) > 1:
                yield Problem(
                    f"{', '.join(names)} of {prefix} are quantised in different ways, and the export packs "
                    "them into one matrix",
                    where="overrides",
                    fix="Give all of them the same bits, group_size and symmetric.",
                )
                return


def _width(info: ModelInfo, name: str) -> int:
    stored = info.tensors.get(f"{name}.weight") or info.tensors.get(f"{EMBEDDING}.weight")
    return stored[1][1] if stored else 0
