"""Name -> pass: one lazy table, plus the entry-point group ``olive.passes``."""

from __future__ import annotations

import importlib
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from olive.config.base import PassParams
from olive.errors import ConfigError
from olive.passes.base import Pass

_TABLE: dict[str, str] = {
    "LoRA": "olive.passes.finetune.lora:LoRA",
    "QLoRA": "olive.passes.finetune.qlora:QLoRA",
    "DoRA": "olive.passes.finetune.dora:DoRA",
    "LoHa": "olive.passes.finetune.loha:LoHa",
    "LoKr": "olive.passes.finetune.lokr:LoKr",
    "LoftQ": "olive.passes.finetune.loftq:LoftQ",
    "DPO": "olive.passes.finetune.dpo:DPO",
    "ORPO": "olive.passes.finetune.orpo:ORPO",
    "FullFinetune": "olive.passes.finetune.full:FullFinetune",
    "MergeAdapterWeights": "olive.passes.adapters.merge:MergeAdapterWeights",
    "Rtn": "olive.passes.quantize.rtn:Rtn",
    "KQuant": "olive.passes.quantize.k_quant:KQuant",
    "Gptq": "olive.passes.quantize.gptq:Gptq",
    "Awq": "olive.passes.quantize.awq:Awq",
    "AutoRound": "olive.passes.quantize.auto_round:AutoRound",
    "Hqq": "olive.passes.quantize.hqq:Hqq",
    "QuaRot": "olive.passes.quantize.quarot:QuaRot",
    "SpinQuant": "olive.passes.quantize.spinquant:SpinQuant",
    "SelectiveMixedPrecision": "olive.passes.quantize.mixed_precision:SelectiveMixedPrecision",
    "SaveQuantized": "olive.passes.save.save_quantized:SaveQuantized",
    "SaveGguf": "olive.passes.save.save_gguf:SaveGguf",
    "ModelBuilder": "olive.passes.export.model_builder:ModelBuilder",
    "OnnxBlockWiseRtnQuantization": "olive.passes.onnx.rtn:OnnxBlockWiseRtnQuantization",
    "OnnxKQuantQuantization": "olive.passes.onnx.k_quant:OnnxKQuantQuantization",
    "OnnxHqqQuantization": "olive.passes.onnx.hqq:OnnxHqqQuantization",
    "OnnxQuantization": "olive.passes.onnx.quantization:OnnxQuantization",
    "OnnxStaticQuantization": "olive.passes.onnx.static_quantization:OnnxStaticQuantization",
    "OnnxDynamicQuantization": "olive.passes.onnx.dynamic_quantization:OnnxDynamicQuantization",
    "OnnxFloatToFloat16": "olive.passes.onnx.float16:OnnxFloatToFloat16",
    "OrtMixedPrecision": "olive.passes.onnx.mixed_precision:OrtMixedPrecision",
    "OnnxBnb4Quantization": "olive.passes.onnx.bnb4:OnnxBnb4Quantization",
    "MatMulNBitsToQDQ": "olive.passes.onnx.qdq:MatMulNBitsToQDQ",
}


@cache
def _targets() -> dict[str, str]:
    plugins = {point.name: point.value for point in entry_points(group="olive.passes")}
    return plugins | _TABLE


def names() -> tuple[str, ...]:
    """Every pass that a document may name."""
    return tuple(sorted(_targets()))


@cache
def resolve(name: str) -> type[Pass[Any]]:
    """The pass called ``name``; case does not matter.

    Raises:
        ConfigError: no such pass; the message says which one was probably meant.
    """
    by_lower = {known.lower(): known for known in _targets()}
    known = by_lower.get(name.lower())
    if known is None:
        close = get_close_matches(name.lower(), list(by_lower), n=1)
        hint = f"did you mean {by_lower[close[0]]}?" if close else f"known passes: {', '.join(names())}"
        raise ConfigError(f"there is no pass called {name!r}", fix=hint)
    module, _, attribute = _targets()[known].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise ConfigError(
            f"{_targets()[known]} is not a Pass", fix="Plug-in developer: subclass olive.passes.base.Pass."
        )
    return found


def params_of(name: str) -> type[PassParams]:
    """The parameter type of the pass called ``name``."""
    return resolve(name).Params


def canonical(name: str) -> str:
    """The registered spelling of a pass name, or the name itself when unknown."""
    return {known.lower(): known for known in _targets()}.get(name.lower(), name)
