"""Fold LoRA weights into the base model, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config.base import Dtype, PassParams
from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import OliveError, PassFailed, Problem
from olive.hardware.machine import Machine
from olive.models import seen
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import finish_folder, read_json
from olive.models.quantised import format_of
from olive.models.stream import Layout, LazyTensors, SeenTensors, stored_code, stored_dtype, write
from olive.models.tensors import INDEX, Tensors
from olive.passes.adapters import lora_weights
from olive.passes.base import Cost, Pass, PassContext

if TYPE_CHECKING:
    import torch

_WHERE = "MergeAdapterWeights"
_PAIR = _EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CODE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class MergeAdapterWeights(Pass["MergeAdapterWeights.Params"]):
    """Fold an adapter into the base model its training saw: LoRA, rsLoRA, DoRA, LoHa, LoKr.

    Every tensor is streamed from the base to the result; a target becomes ``W + scale B A`` (or what its
    method makes of it), added up in float32 and rounded once to the stored dtype. Where training saw rounded
    weights (QLoRA, LoftQ), W is what those stand for, in every layer that was rounded. No model is built.
    """

    class Params(PassParams):
        """What to store."""

        dtype: Dtype | None = Field(
            None,
            description="Dtype to store. Default: the wider of the base's own and the one the adapter was "
            "trained in, so that nothing is rounded away.",
        )

    accepts = (Kind.ADAPTER,)
    produces = Kind.HF
    libraries = ("torch", "safetensors")
    gates = ("merge",)

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Refuse a quantised base, and an adapter of the document that does not fit it."""
        method = format_of(model.config)
        if method:
            yield Problem(
                f"the base model is stored quantised ({method}); merge into floating point",
                where=_WHERE,
                fix="Use the unquantised model as input_model.",
            )
        elif model.adapter is not None:
            try:
                check_fit(lora_weights.read(model.adapter), model.tensors)
            except OliveError as error:
                for problem in error.problems:
                    yield replace(problem, where=_WHERE, exit_code=6 if problem.exit_code == 6 else 2)

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """The memory of the merge gate, which runs the whole model in float32; merging needs one tensor."""
        disk = model.parameters * _CODE_BYTES[params.dtype or "float32"]
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        memory = (500 << 20) + 4 * model.parameters + 4 * largest
        return Cost(memory=memory, disk=disk, seconds=0.5 + disk / 5e8)

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the merged model into ``ctx.out``.

        Raises:
            PassFailed: the adapter does not fit the base.
        """
        if model.base is None:
            raise PassFailed(
                "the adapter names no base model", where=_WHERE, fix="Set input_model.model_path to its base."
            )
        adapter = lora_weights.read(model.path)
        with (
            SeenTensors(model.base.path, seen.read(model.path)) as base,
            LazyTensors(model.path) as factors,
        ):
            wide = any(base.code(name) in ("F32", "F64") for name in base)
            dtype = params.dtype or ("float32" if wide else model.attributes.get("dtype"))
            check_fit(adapter, base.layout)
            config = _config(model.base.path, dtype)
            merger = _Merger(base, factors, adapter, dtype, config)
            ctx.progress.start("merge", len(base))
            merger.write(ctx)
            ctx.progress.finish()
        (ctx.out / "config.json").write_text(json.dumps(merger.config, indent=2) + "\n", encoding="utf-8")
        finish_folder(ctx.out, model.base.path)
        ctx.facts.update(
            merged_tensors=len(adapter.deltas) + len(adapter.products),
            replaced_tensors=len(adapter.replaced),
            dtype=dtype or "as the base",
        )
        if dtype:
            ctx.attributes["dtype"] = dtype


def check_fit(adapter: lora_weights.Adapter, base: Tensors) -> None:
    """Every tensor of the adapter has its place in the base, with the right shape; told from headers alone.

    Raises:
        PassFailed: naming the first tensors that do not fit, and what the base has instead.
    """
    shapes = {name: shape for name, (_, shape) in base.items()}
    if _HEAD not in shapes and _EMBEDDING in shapes:
        shapes[_HEAD] = shapes[_EMBEDDING]
    lost = [*adapter.foreign, *sorted(name for name in adapter.targets if name not in shapes)]
    if lost or not adapter.targets:
        modules = sorted(
            {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in base if name.count(".") > 2}
        )
        raise PassFailed(
            f"{len(lost)} tensors of the adapter have no place in the base model, e.g. {', '.join(lost[:3])}"
            if lost
            else "the adapter holds no tensors",
            where=_WHERE,
            fix=f"This adapter belongs to another model. The base has {', '.join(modules[:12])}.",
        )
    for target in (*adapter.deltas, *adapter.products):
        trained = lora_weights.shape_of(adapter, target)
        if shapes[target] != trained:
            raise PassFailed(
                f"{target} of the base has shape {shapes[target]}, the adapter was trained on {trained}",
                where=_WHERE,
                fix="This adapter belongs to another base: set input_model.model_path to the right one.",
            )
    for target, source in adapter.replaced.items():
        if adapter.tensors[source][1] != shapes[target]:
            raise PassFailed(
                f"{target} of the base has shape {shapes[target]}, "
                f"the adapter brings {adapter.tensors[source][1]}",
                where=_WHERE,
                fix="The adapter resized this layer (a larger vocabulary?): give the base the same size.",
            )


class _Merger:
    """Gives each tensor of the result."""

    def __init__(
        self,
        base: LazyTensors,
        factors: LazyTensors,
        adapter: lora_weights.Adapter,
        dtype: str | None,
        config: dict[str, Any],
    ) -> None:
        self.base, self.factors, self.adapter, self.dtype, self.config = base, factors, adapter, dtype, config
        self.untied = _unties(adapter, base, factors)
        if self.untied:
            # Embedding and head were one tensor and are two now: the change is in one of them only.
            config["tie_word_embeddings"] = False

    def write(self, ctx: PassContext) -> None:
        """Write the files of the base, with their names, merged."""
        total, done, table = 0, 0, {}
        for number, (file, names) in enumerate(self.base.by_file.items()):
            names = [*names, *([_HEAD] if self.untied and number == 0 else [])]
            layout = {name: self._layout(name) for name in names}

            def load(name: str) -> torch.Tensor:
                nonlocal done
                done += 1
                ctx.progress.update(done)
                return self.load(name)

            total += write(ctx.out / file, layout, load)
            table.update(dict.fromkeys(names, file))
        if len(self.base.by_file) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": table}
            (ctx.out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _source(self, name: str) -> str:
        return name if name in self.base else _EMBEDDING

    def _layout(self, name: str) -> Layout:
        source = self._source(name)
        return stored_code(self.base.code(source), self.dtype), self.base.shape(source)

    def load(self, name: str) -> torch.Tensor:
        """The tensor of the result called ``name``."""
        import torch

        source = self._source(name)
        replaced = self.adapter.replaced.get(name)
        value = self.factors[replaced] if replaced else self.base[source]
        delta = self.adapter.deltas.get(name)
        if delta is not None:
            value = value.to(torch.float32, copy=True)
            lora_weights.add_product(value, self.factors[delta.a], self.factors[delta.b], delta)
            if delta.magnitude is not None:
                lora_weights.change_length(value, self.factors[delta.magnitude])
        elif (product := self.adapter.products.get(name)) is not None:
            value = value.to(torch.float32, copy=True)
            value += lora_weights.product_change(product, self.factors)
        return value.to(stored_dtype(self._layout(name)[0]))


def _unties(adapter: lora_weights.Adapter, base: LazyTensors, factors: LazyTensors) -> bool:
    """Whether a shared embedding and head must be stored apart to stay what was trained."""
    if _HEAD in base or _EMBEDDING not in base:
        return False
    if not (adapter.deltas.keys() | adapter.products.keys()).isdisjoint(_PAIR):
        return True
    if adapter.replaced.keys().isdisjoint(_PAIR):
        return False
    one, other = (
        factors[adapter.replaced[name]] if name in adapter.replaced else base[_EMBEDDING] for name in _PAIR
    )
    return not one.float().equal(other.float())


def _config(folder: Path, dtype: str | None) -> dict[str, Any]:
    """The base's config with the dtype of the result, without code of its own and without quantisation."""
    config = read_json(folder / "config.json")
    config.pop("auto_map", None)
    if dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(keys, dtype))
    return config
