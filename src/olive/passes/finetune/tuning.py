"""What every way of fine-tuning shares: data, dtype, training, checkpoints, facts. Methods say the rest."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from olive.config.base import Dtype, PassParams
from olive.config.workflow import Accelerator, Devices
from olive.data.plan import Preview
from olive.errors import ConfigError, PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.hardware.probe import matrix_rate, training_dtype
from olive.models import seen
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.seen import Seen
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.finetune import arguments, stopping, tracking, training_data
from olive.passes.finetune.memory import MOST_TOKENS, token_bytes
from olive.passes.finetune.targets import adapted, check_targets, targets

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from olive.passes.finetune.trainer import PackedTrainer

_USUAL_SHARE = 0.6  # of the nominal matrix rate that training reaches
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class TuningParams(PassParams):
    """Settings of every fine-tuning pass; names of Olive 0.13."""

    target_modules: tuple[str, ...] | str | None = Field(
        None,
        description="Linear layers to adapt: ends of their names, one regular expression for the whole name, "
        "or all-linear; default by architecture.",
    )
    modules_to_save: tuple[str, ...] | None = Field(
        None, description="Layers trained in full and saved whole."
    )
    layers_to_transform: tuple[int, ...] | None = Field(
        None, description="Numbers of the layers to adapt; default: all."
    )
    torch_dtype: Dtype | None = Field(
        None, description="Dtype of the base; default: what the device does natively."
    )
    train_data_config: str = Field(
        description="Data to train on.", json_schema_extra={"reference": "data_configs"}
    )
    eval_data_config: str | None = Field(
        None, description="Data to evaluate on.", json_schema_extra={"reference": "data_configs"}
    )
    eval_dataset_size: float | None = Field(
        None, ge=0, description="Rows split off for evaluation: below 1 a share, from 1 on a number."
    )
    training_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Any field of transformers' TrainingArguments, and early_stopping_patience and "
        "early_stopping_threshold.",
    )

    def placement(self, modules: list[str] | str) -> dict[str, Any]:
        """Where the adapter goes, as every configuration of PEFT takes it."""
        return {
            "target_modules": modules,
            "modules_to_save": list(self.modules_to_save) if self.modules_to_save else None,
            "layers_to_transform": list(self.layers_to_transform) if self.layers_to_transform else None,
            "task_type": "CAUSAL_LM",
        }


P = TypeVar("P", bound=TuningParams)


class Tuning(Pass[P]):
    """Base of the fine-tuning passes. A method overrides at most the functions below ``run``."""

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.HF, Kind.ADAPTER)
    produces: ClassVar[Kind] = Kind.ADAPTER
    extra = "cpu"
    libraries = ("torch", "transformers", "peft", "accelerate", "safetensors")
    hardware = ("device", "training_dtype")
    needs_targets: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ("loss",)  # by an evaluation in training

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Target modules exist, the dtype makes sense here, and evaluation data is named once."""
        from olive.models.hf import linear_modules

        modules = dict(linear_modules(model))
        if self.needs_targets:
            yield from check_targets(model, params.target_modules, params.layers_to_transform, modules)
        native = training_dtype(machine, accelerator.device)
        if params.torch_dtype is not None and params.torch_dtype != native:
            slow = accelerator.device == "cpu" or params.torch_dtype == "bfloat16"
            if slow and _BYTES[params.torch_dtype] < _BYTES[native]:
                yield Problem(
                    f"torch_dtype {params.torch_dtype} has no native units on {machine.cpu or 'this CPU'}",
                    fix=f"leave torch_dtype out; {native} is used then",
                    severity=Severity.WARNING,
                )
        if params.eval_data_config and params.eval_dataset_size:
            yield Problem(
                "both eval_data_config and eval_dataset_size are given: nothing is split off",
                fix="remove one of them",
                severity=Severity.WARNING,
            )
        has_eval = bool(params.eval_data_config or params.eval_dataset_size)
        yield from stopping.check(params.training_args, has_eval, self.measured)
        yield from tracking.check(params.training_args)
        for flag in ("bf16", "fp16"):
            if params.training_args.get(flag) and accelerator.device == "cpu" and native == "float32":
                yield Problem(
                    f"training_args.{flag} casts at every layer, and this CPU has no units for it: slow",
                    fix="remove it",
                    severity=Severity.WARNING,
                )

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """Weights, optimizer state, activations of a packed forward pass; 4 FLOPs a weight and token."""
        dtype = params.torch_dtype or training_dtype(machine, "cpu")
        width, train = _BYTES[dtype], data.get(params.train_data_config)
        trained, base = self.trained_parameters(model, params), self.base_bytes(model, params, width)
        at_once = max(MOST_TOKENS["cpu"], train.longest_block if train else 0)
        twice = params.training_args.get("gradient_checkpointing") is True
        activations = at_once * token_bytes(model.config, width, checkpointing=twice)
        return Cost(
            memory=(800 << 20) + base + trained * 16 + activations,
            disk=trained * 4 + 2 * trained * 12 + 4 * sum(d.tokens for d in data.values() if d.streamed),
            seconds=_seconds(model, params, matrix_rate(machine, dtype), trained, train),
        )

    def processes(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator, devices: Devices
    ) -> tuple[int, str]:
        """Every GPU that a step has a row for, one process on a CPU; whole models where they fit."""
        on_gpu, rows = accelerator.device == "gpu", arguments.rows_of_a_step(params.training_args)
        found = len(machine.gpus) if on_gpu else 1
        count = found if devices.count == "auto" else devices.count
        count = max(1, min(rows, count * devices.hosts) // devices.hosts) * devices.hosts
        strategy = devices.strategy
        if strategy == "auto":
            strategy = "ddp"
            if on_gpu and machine.gpus and "fsdp" in self.strategies:
                base = self.base_bytes(model, params, _BYTES[params.torch_dtype or "bfloat16"])
                needed = base + 16 * self.trained_parameters(model, params)
                if needed > 0.8 * min(gpu.memory for gpu in machine.gpus):
                    strategy = "fsdp"
        return count, strategy

    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Train, and write the adapter into ``ctx.out``."""
        from olive.passes.finetune.run import train_blocks

        began = time.perf_counter()
        data = training_data.load(model, params, ctx, pairs=self.pairs)
        dtype = self.dtype_of(params, ctx)
        tuned = self.prepare(model, params, dtype, ctx)
        given = self.arguments(params, ctx)
        curve, steps = train_blocks(tuned, given, ctx, dtype, data, self.trainer(params))
        if ctx.place.rank == 0:
            self.save(tuned, model, params, ctx)
        ctx.series["loss"] = curve.points
        ctx.facts |= {
            "method": type(self).__name__,
            "dtype": dtype,
            "trainable_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
            "blocks": len(data.train),
            "eval_blocks": len(data.held_out),
            "steps": steps,
            "tokens": curve.tokens,
            "training_seconds": round(curve.seconds, 3),
            "seconds": round(time.perf_counter() - began, 3),
            "tokens_per_second": round(curve.tokens / curve.seconds, 1) if curve.seconds else 0.0,
        }
        metric, greater = stopping.watched(given)
        best = stopping.best_point(curve.points, metric, greater)
        if best is not None:
            ctx.facts |= {"best_step": best["step"], f"best_{metric}": best[metric]}
        if curve.stopped:
            ctx.facts["stopped_early"] = True
        ctx.attributes["dtype"] = dtype

    def dtype_of(self, params: P, ctx: PassContext) -> Dtype:
        """Dtype of the base's weights."""
        return params.torch_dtype or training_dtype(ctx.machine, ctx.accelerator.device)

    def arguments(self, params: P, ctx: PassContext) -> dict[str, Any]:
        """The document's ``training_args``, with what the method needs."""
        return params.training_args

    def trainer(self, params: P) -> Callable[..., PackedTrainer]:
        """What trains; called with the arguments of ``PackedTrainer``."""
        from olive.passes.finetune.trainer import PackedTrainer

        return PackedTrainer

    def peft_config(self, params: P, modules: list[str] | str) -> PeftConfig:
        """PEFT's description of the adapter, for ``adapt``; a method without one overrides that.

        Args:
            params: of the pass.
            modules: what PEFT takes as ``target_modules``.
        """
        raise NotImplementedError

    @abstractmethod
    def parameters_of(self, params: P, rows: int, columns: int) -> int:
        """Numbers trained for a linear layer of (rows, columns)."""

    def trained_parameters(self, model: ModelInfo, params: P) -> int:
        """Numbers trained in all."""
        layers = adapted(model, params.target_modules, params.layers_to_transform)
        return sum(self.parameters_of(params, *shape) for _, shape in layers)

    def base_bytes(self, model: ModelInfo, params: P, width: int) -> int:
        """Bytes of the base in memory, ``width`` bytes a number."""
        return model.parameters * width

    def load_base(
        self, folder: Path, params: P, dtype: Dtype, ctx: PassContext, told: Seen | None
    ) -> PreTrainedModel:
        """The base on the device, with the packed attention; as ``told`` where an adapter is gone on from."""
        from olive.passes.finetune.base_weights import load_on_cpu, round_base

        base = load_on_cpu(folder, dtype)
        if told is not None:
            return round_base(base, folder, told, dtype, ctx)
        return base.to("cpu" if ctx.accelerator.device == "cpu" else "cuda")

    def prepare(self, model: Artifact, params: P, dtype: Dtype, ctx: PassContext) -> Any:
        """The model to train: a base with fresh adapters, or with those of ``model`` to go on from."""
        import torch
        from transformers import set_seed

        from olive.hardware.memory import exempt_libraries
        from olive.passes.finetune import run  # noqa: F401 - all imports before the weights

        exempt_libraries()
        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
        given = model if model.base is None else model.base
        told = None if model.base is None else seen.read(model.path)
        base = self.load_base(given.path, params, dtype, ctx, told)
        set_seed(int(params.training_args.get("seed", 42)))
        tuned = self.adapt(base, model, params)
        tuned.olive_seen = getattr(base, "olive_seen", None)
        return tuned

    def adapt(self, base: PreTrainedModel, model: Artifact, params: P) -> Any:
        """``base`` with its adapters."""
        from peft import PeftModel, get_peft_model

        from olive.passes.finetune.base_weights import linear_names

        names = {name.rpartition(".")[2] for name in linear_names(base, quantised=True)}
        modules = targets(base.config.to_dict(), params.target_modules, names)
        try:
            if model.base is not None:
                return PeftModel.from_pretrained(base, model.path, is_trainable=True)
            return get_peft_model(base, self.peft_config(params, modules))
        except ValueError as error:
            raise ConfigError(
                f"the adapter does not fit the model: {error}", fix="correct target_modules"
            ) from error

    def save(self, tuned: Any, model: Artifact, params: P, ctx: PassContext) -> None:
        """Write the adapter, naming its base by the folder's name; nothing needs that name to load it."""
        given = model if model.base is None else model.base
        for config in tuned.peft_config.values():
            config.base_model_name_or_path = given.path.name
            config.inference_mode = True
        tuned.save_pretrained(str(ctx.out), safe_serialization=True, save_embedding_layers=False)
        if tuned.olive_seen is not None:
            tuned.olive_seen.write(ctx.out)
        (ctx.out / "README.md").unlink(missing_ok=True)
        if not (ctx.out / "adapter_model.safetensors").exists():
            raise PassFailed(
                "PEFT wrote no adapter_model.safetensors", fix="Install a tested version of peft."
            )


def _seconds(
    model: ModelInfo, params: TuningParams, rate: float | None, adapter: int, train: Preview | None
) -> float | None:
    """Start-up and training on a CPU, at the share of its matrix rate that is usual; None when not known."""
    args = params.training_args
    if rate is None or train is None or not train.blocks:
        return None
    rows = int(args.get("per_device_train_batch_size", 1)) * int(args.get("gradient_accumulation_steps", 1))
    steps = int(args.get("max_steps", -1))
    seen = steps * rows if steps > 0 else float(args.get("num_train_epochs", 3)) * train.blocks
    # a head sees only the tokens with a label; its weights are in no layer
    head = int(model.config.get("vocab_size", 0)) * int(model.config.get("hidden_size", 0))
    tied = bool(model.config.get("tie_word_embeddings"))
    inner = model.parameters - head * (1 if tied else 2) + adapter
    labelled = train.trained_tokens / max(1, train.tokens)
    tokens = seen * train.tokens / train.blocks
    return 8 + tokens * 4 * (inner + labelled * head) / (_USUAL_SHARE * rate)
