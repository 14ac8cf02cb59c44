"""Export a language model with onnxruntime-genai's model builder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from importlib import import_module
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import AliasChoices, Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import EnvironmentFault, PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.hardware.memory import release_memory
from olive.hardware.tested import TESTED, version_tuple
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import copy_tokenizer, describe
from olive.models.quantised import METHOD, method_of
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.export import builder_source, integers
from olive.passes.export.quiet import captured
from olive.passes.quantize.targets import check_stored

_DISTRIBUTIONS = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
_NEEDED = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime")
_MINIMUM = "0.18"
_PROVIDERS = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "WebGpuExecutionProvider": "webgpu",
    "NvTensorRTRTXExecutionProvider": "NvTensorRtRtx",
}
# float16 on the CPU is left out: the builder makes a graph that fails at the second token (0.18).
_PRECISIONS = {
    "cpu": ("fp32", "int8", "int4"),
    "cuda": ("fp32", "fp16", "bf16", "int8", "int4"),
    "dml": ("fp16", "int4"),
    "webgpu": ("fp16", "int8", "int4"),
    "NvTensorRtRtx": ("fp16", "bf16", "int4"),
}
# Options that make a part of a model, run code, hold a secret, or are the pass's own business.
_REFUSED = {
    "config_only": "it writes no model",
    "exclude_embeds": "it makes a part of a model, which cannot be checked or run",
    "exclude_lm_head": "it makes a part of a model, which cannot be checked or run",
    "hf_remote": "it runs code that the model's folder brings",
    "hf_token": "models are local when they get here; a secret does not belong in the document",
    "hf_details": "the pass sets it",
    "adapter_path": "merge the adapter with MergeAdapterWeights first",
}
# What onnxruntime-genai reads under "search"; it refuses a folder that names anything else.
_SEARCH = (
    "batch_size", "blank_penalty", "chunk_size", "diversity_penalty", "do_sample", "early_stopping",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
    "past_present_share_buffer", "random_seed", "repetition_penalty", "temperature", "top_k", "top_p",
)  # fmt: skip
_QUANTISED = ("int4", "int8")
_Option = str | int | float | bool
_WHERE = "ModelBuilder"


class ModelBuilder(Pass["ModelBuilder.Params"]):
    """Write an ONNX model with fused attention, its weights, genai_config.json and tokenizer, ready to run.

    The graph is made by onnxruntime-genai's builder. Weights go from the model's files to the graph's one
    matrix at a time, rounded on the way, so that memory does not grow with the model.
    Names of Olive 0.13 (``int4_block_size`` and so on) are accepted for the quantiser's parameters.
    """

    class Params(PassParams):
        """Precision and quantiser; `extra_options` goes to the builder as it is."""

        precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] = Field(
            description="Precision of the weights."
        )
        block_size: Literal[16, 32, 64, 128, 256] = Field(
            32,
            validation_alias=AliasChoices("block_size", "int4_block_size"),
            description="int4, int8: weights that share one scale.",
        )
        accuracy_level: Literal[0, 1, 2, 3, 4] | None = Field(
            None,
            validation_alias=AliasChoices("accuracy_level", "int4_accuracy_level"),
            description="int4, int8: what activations are computed in: 1 float32, 2 float16, 3 bfloat16, "
            "4 int8. Default: 4 on the CPU, else the kernel's own.",
        )
        is_symmetric: bool = Field(
            True,
            validation_alias=AliasChoices("is_symmetric", "int4_is_symmetric"),
            description="int4, int8: no zero points.",
        )
        op_types_to_quantize: tuple[Literal["MatMul", "Gather"], ...] | None = Field(
            None,
            validation_alias=AliasChoices("op_types_to_quantize", "int4_op_types_to_quantize"),
            description="int4, int8: default MatMul, and Gather where embedding and head are one matrix.",
        )
        nodes_to_exclude: tuple[str, ...] | None = Field(
            None,
            validation_alias=AliasChoices("nodes_to_exclude", "int4_nodes_to_exclude"),
            description="int4, int8: nodes left in full precision, e.g. /lm_head/MatMul.",
        )
        algo_config: Literal[
            "default", "rtn", "k_quant", "rtn_last", "k_quant_last", "k_quant_mixed", "k_quant_linear"
        ] = Field(
            "default",
            validation_alias=AliasChoices("algo_config", "int4_algo_config"),
            description="int4: how weights are rounded, and which keep 8 bits (`_last`: the head; "
            "`_mixed`: also the most sensitive layers). `k_quant` searches scale and zero point.",
        )
        matmul_mixed_precision: (
            dict[Literal["last_matmul", "mixed_layers", "linear_attn"], Literal["int4", "int8"]] | None
        ) = Field(None, description="int4: which groups of layers get another precision.")
        use_qdq: bool = Field(False, description="Quantise-dequantise nodes in place of the fused operator.")
        search: dict[str, _Option] = Field(
            {}, description="Generation defaults written to genai_config.json."
        )
        extra_options: dict[str, _Option] = Field(
            {}, description="Any other option of the builder, by its name."
        )

    accepts, produces = (Kind.HF,), Kind.GENAI
    extra = "cpu"
    libraries = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers")
    gates = ("parity", "bundle")
    hardware = ("execution_provider",)
    reads_integers = True

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Packages, architecture, provider, precision and option names, before anything runs."""
        yield from _check_packages(machine)
        provider = _PROVIDERS.get(accelerator.execution_provider)
        if provider is None:
            yield Problem(
                f"the builder makes no model for {accelerator.execution_provider}",
                where=_WHERE,
                fix=f"Use one of {', '.join(_PROVIDERS)}.",
            )
        elif params.precision not in _PRECISIONS[provider]:
            yield Problem(
                f"precision {params.precision} does not run on {accelerator.execution_provider}",
                where=_WHERE,
                fix=f"Use one of {', '.join(_PRECISIONS[provider])}.",
            )
        if method_of(model.config) == METHOD:
            yield from self.check_integers(params)
            yield from check_stored(model, accelerator.execution_provider)
        source = builder_source.read()
        if source is not None:
            yield from _check_architecture(model, source)
            yield from _check_options(params, source)
        yield from _check_search(params, machine)

    def check_integers(self, params: Params) -> Iterable[Problem]:
        """Integers stay what they are, in an export of integers."""
        return integers.check_precision(params.precision)

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """Measured on 135M to 3.8B parameters: libraries, and the largest matrix twice, rounded.

        Where the builder quantises itself it holds the model several times.
        """
        count = model.parameters
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        quantised = params.precision in _QUANTISED
        searched = quantised and params.algo_config.startswith("k_quant")
        bytes_each = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.2, "int4": 0.65}[params.precision]
        memory = (500 << 20) + (13 * count if params.use_qdq else int(2 * bytes_each * largest))
        rate = 4e-8 if params.use_qdq else (2.5e-8 if searched else 5e-9) / min(machine.cores, 16)
        return Cost(memory=memory, disk=int(count * bytes_each), seconds=3.0 + count * (rate + 1e-9))

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Export ``model`` into ``ctx.out``.

        Raises:
            PassFailed: the builder failed; the message ends with what it said.
        """
        provider = _PROVIDERS[ctx.target.execution_provider]
        quantised = integers.stored_as_integers(model.path)
        if quantised:
            integers.check(model.path, params.precision)
        options = builder_options(params, tied(describe(model.path)))
        ctx.progress.start(f"export {params.precision}")
        with ExitStack() as stack:
            source, files = model.path, None
            if quantised or integers.foreign(model.path):
                scratch = Path(stack.enter_context(TemporaryDirectory(prefix="olive-"))) / "model"
                if quantised:
                    source, files = stack.enter_context(integers.prepared(model.path, scratch))
                else:
                    source = stack.enter_context(integers.expanded(model.path, scratch))
            how = _build(source, ctx.out, params.precision, provider, options, files, stored=model.path)
        if quantised:
            integers.finish_head(ctx.out, model.path)
        ctx.progress.finish()
        copy_tokenizer(model.path, ctx.out)
        _finish(ctx.out, params.search)
        ctx.attributes.update(precision=params.precision, execution_provider=ctx.target.execution_provider)
        ctx.facts.update(precision=params.precision, provider=provider, options=options, **how)


def tied(model: ModelInfo) -> bool:
    """Whether embedding and head are one matrix, which the builder then stores once."""
    return bool(model.config.get("tie_word_embeddings", "lm_head.weight" not in model.tensors))


def method(params: ModelBuilder.Params, shared: bool) -> str:
    """How weights are rounded: ``algo_config``, or ``rtn`` where the builder's default makes a broken graph.

    With one matrix for embedding and head, 0.18 writes a model that does not load when that matrix has zero
    points or 8 bits under ``default``; ``rtn`` is the same rounding by other code.
    """
    head = (params.matmul_mixed_precision or {}).get("last_matmul", "int4")
    shared = shared and str(params.extra_options.get("shared_embeddings", True)).lower() not in ("false", "0")
    broken = params.precision == "int4" and shared and (not params.is_symmetric or head != "int4")
    return "rtn" if params.algo_config == "default" and broken else params.algo_config


def builder_options(params: ModelBuilder.Params, shared: bool) -> dict[str, str]:
    """The options as the builder's command line takes them: name -> text.

    Args:
        params: of the pass.
        shared: embedding and head are one matrix.
    """
    options: dict[str, Any] = {"hf_token": False}
    if params.precision in _QUANTISED:
        options |= {
            "block_size": params.block_size,
            "accuracy_level": params.accuracy_level,
            "is_symmetric": params.is_symmetric,
            "algo_config": method(params, shared),
            "op_types_to_quantize": "/".join(params.op_types_to_quantize or ()) or None,
            "nodes_to_exclude": ",".join(params.nodes_to_exclude or ()) or None,
            "use_qdq": params.use_qdq or None,
        }
        placement = params.matmul_mixed_precision or {}
        options["matmul_mixed_precision"] = ",".join(f"{k}:{v}" for k, v in placement.items()) or None
    options |= params.extra_options
    return {name: _text(value) for name, value in options.items() if value is not None}


def _text(value: _Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_packages(machine: Machine) -> Iterable[Problem]:
    name = next((name for name in _DISTRIBUTIONS if name in machine.packages), None)
    missing = [needed for needed in _NEEDED if needed not in machine.packages]
    if "onnxruntime" in missing and any(have.startswith("onnxruntime-") for have in machine.packages):
        missing.remove("onnxruntime")
    if name is None:
        missing.insert(0, "onnxruntime-genai")
    elif version_tuple(machine.packages[name]) < version_tuple(_MINIMUM):
        yield Problem(
            f"{name} {machine.packages[name]} is too old: its builder fails with today's transformers",
            where=_WHERE,
            fix=f'pip install --upgrade "{name}>={_MINIMUM}"',
            exit_code=5,
        )
    if missing:
        yield Problem(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where=_WHERE,
            fix='pip install "olive-next[cpu]"',
            exit_code=5,
        )


def _check_architecture(model: ModelInfo, source: builder_source.BuilderSource) -> Iterable[Problem]:
    config = model.config
    if model.kind is not Kind.HF:
        return
    if model.architecture not in source.architectures:
        yield Problem(
            f"the builder does not know the architecture {model.architecture or 'of this model'!r}",
            where=_WHERE,
            fix=f"It exports {', '.join(sorted(source.architectures))}.",
        )
    longest, original = (
        config.get("max_position_embeddings"),
        config.get("original_max_position_embeddings", 4096),
    )
    scaled = (
        config.get("rope_scaling") or (config.get("rope_parameters") or {}).get("rope_type") == "longrope"
    )
    if model.architecture == "Phi3ForCausalLM" and longest != original and not scaled:
        yield Problem(
            f"max_position_embeddings {longest} differs from original_max_position_embeddings {original}, "
            "and the config has no longrope scaling: the builder takes the long-context path and fails",
            where=_WHERE,
            fix="Set both to the same number in the model's config.json.",
        )


def _check_options(params: ModelBuilder.Params, source: builder_source.BuilderSource) -> Iterable[Problem]:
    typed = set(ModelBuilder.Params.model_fields)
    for name in params.extra_options:
        plain = name.removeprefix("int4_")
        where = f"{_WHERE}.extra_options.{name}"
        if name in _REFUSED:
            code = 6 if name == "hf_remote" else 2
            yield Problem(f"{name} is not accepted: {_REFUSED[name]}", where, "Remove it.", exit_code=code)
        elif plain in typed:
            yield Problem(f"{name} has a parameter of its own", where, f"Set {plain} beside precision.")
        elif name not in source.options:
            close = get_close_matches(name, [*source.options, *typed], n=1)
            yield Problem(
                f"the builder has no option {name!r} and would ignore it",
                where,
                f"Did you mean {close[0]}?" if close else "Remove it.",
            )
    quantiser = params.model_fields_set - {"precision", "search", "extra_options"}
    if params.precision not in _QUANTISED and quantiser:
        yield Problem(
            f"{', '.join(sorted(quantiser))} only matter for int4 and int8, not for {params.precision}",
            where=_WHERE,
            severity=Severity.NOTE,
        )


def _check_search(params: ModelBuilder.Params, machine: Machine) -> Iterable[Problem]:
    version = next((machine.packages[name] for name in _DISTRIBUTIONS if name in machine.packages), "")
    newer = version_tuple(version) > version_tuple(TESTED["onnxruntime-genai"])
    for name in params.search:
        if name not in _SEARCH:
            close = get_close_matches(name, _SEARCH, n=1)
            yield Problem(
                f"onnxruntime-genai has no generation setting {name!r} and loads no model that names it",
                f"{_WHERE}.search.{name}",
                f"Did you mean {close[0]}?" if close else f"It has {', '.join(_SEARCH)}.",
                Severity.WARNING if newer else Severity.ERROR,
            )


def _build(
    source: Path,
    out: Path,
    precision: str,
    provider: str,
    options: Mapping[str, str],
    files: integers.Files | None = None,
    stored: Path | None = None,
) -> dict[str, str | None]:
    """Run the builder with weights of ours; gives what became of them."""
    scratch = out / ".builder"
    # Memory that training left to the collector would add to the peak here.
    release_memory()
    with captured() as said:
        try:
            from olive.passes.export.deferred import models_deferred
            from olive.passes.export.streaming import files_replaced, streamed

            with models_deferred():
                builder = import_module("onnxruntime_genai.models.builder")

            place = (None, str(source), str(out), precision, provider, str(scratch))
            with ExitStack() as stack:
                stack.enter_context(_uninitialised_layers())
                done = stack.enter_context(streamed(builder, source, stored or source))
                if files is not None:
                    stack.enter_context(files_replaced(files))
                given = [f"{name}={text}" for name, text in options.items()]
                prepared = builder.parse_extra_options(*place, given)
                done.config = prepared["hf_details"]["hf_config"]
                builder.create_model(*place, **prepared)
            rounds = precision in _QUANTISED and not (files and "use_qdq" in options)
            done.ensure(builder, quantised=rounds)
        except ImportError as error:
            raise EnvironmentFault(
                f"onnxruntime-genai's builder does not load: {error}",
                where=_WHERE,
                fix="Compare the versions with the tested set: olive doctor.",
            ) from error
        except (OSError, MemoryError, PassFailed):
            raise
        except Exception as error:
            raise PassFailed(
                f"onnxruntime-genai's builder failed: {type(error).__name__}: {error}\n{said.tail()}",
                where=_WHERE,
                fix="Try another precision or algo_config; `olive doctor` compares the versions.",
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return done.facts


@contextmanager
def _uninitialised_layers() -> Iterator[None]:
    """Let ``torch.nn.Linear`` skip its random start: the builder replaces the weights of all it makes."""
    from torch import nn

    usual = nn.Linear.reset_parameters
    nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.reset_parameters = usual  # type: ignore[method-assign]


def _finish(out: Path, search: Mapping[str, _Option]) -> None:
    """Apply generation defaults; keep the tokenizer's limit a number that every JSON reader can hold."""
    path = out / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["search"] |= search
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    settings = out / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text(encoding="utf-8"))
    if (tokenizer.get("model_max_length") or 0) > config["model"]["context_length"]:
        tokenizer["model_max_length"] = config["model"]["context_length"]
        settings.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
