"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) on PEFT and transformers' Trainer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field

from olive.config.base import Dtype, PassParams
from olive.config.workflow import Accelerator, DataConfig
from olive.data.plan import Preview
from olive.errors import ConfigError, PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.hardware.probe import matrix_rate, training_dtype
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.finetune import arguments

# what PEFT, then Olive, adapt when the document does not say
_TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
} | dict.fromkeys(
    (
        "llama",
        "mistral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "olmo2",
    ),
    ("q_proj", "v_proj"),
)
_USUAL_SHARE = 0.6  # of the nominal matrix rate that training reaches
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LoRA(Pass["LoRA.Params"]):
    """Fine-tune low-rank adapters on a dataset; the base stays as it is and is referred to, not copied."""

    class Params(PassParams):
        """Names and defaults of Olive 0.13."""

        r: int = Field(64, ge=1, description="Rank of the update.")
        alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
        lora_dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
        target_modules: tuple[str, ...] | None = Field(
            None, description="Linear layers to adapt, by the end of their names; default by architecture."
        )
        modules_to_save: tuple[str, ...] | None = Field(
            None, description="Layers trained in full and saved whole."
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
            default_factory=dict, description="Any field of transformers' TrainingArguments."
        )

    accepts, produces = (Kind.HF,), Kind.ADAPTER
    extra = "cpu"
    libraries = ("torch", "transformers", "peft", "accelerate", "safetensors")
    hardware = ("device", "training_dtype")

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Target modules exist, the dtype makes sense here, and evaluation data is named once."""
        from olive.models.hf import linear_modules

        modules = dict(linear_modules(model))
        yield from _check_targets(model, params, modules)
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
        for flag in ("bf16", "fp16"):
            if params.training_args.get(flag) and accelerator.device == "cpu" and native == "float32":
                yield Problem(
                    f"training_args.{flag} casts at every layer, and this CPU has no units for it: slow",
                    fix="remove it",
                    severity=Severity.WARNING,
                )

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """Weights, optimizer state, activations of a packed forward pass; 4 FLOPs a weight and token."""
        dtype = params.torch_dtype or training_dtype(machine, "cpu")
        width, train = _BYTES[dtype], data.get(params.train_data_config)
        config = model.config
        hidden, layers = int(config.get("hidden_size", 1024)), int(config.get("num_hidden_layers", 24))
        inner = int(config.get("intermediate_size", 4 * hidden))
        adapter = _adapter_parameters(model, params)
        at_once = max(arguments.BUDGET["cpu"], train.longest_block if train else 0)
        activations = at_once * layers * (9 * hidden + 3 * inner) * width
        return Cost(
            memory=(600 << 20) + model.parameters * width + adapter * 16 + activations + (200 << 20),
            disk=adapter * 4 + 2 * adapter * 12,
            seconds=_seconds(model, params, matrix_rate(machine, dtype), adapter, train),
        )

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Train, and write the adapter into ``ctx.out``."""
        began = time.perf_counter()
        train, held_out = _blocks(model, params, ctx)
        dtype = params.torch_dtype or _native(ctx)
        peft_model = _model(model, params, dtype, ctx)
        curve, steps = _train(peft_model, params, ctx, dtype, train, held_out)
        _save(peft_model, model, ctx.out)
        trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        ctx.series["loss"] = curve.points
        ctx.facts |= {
            "dtype": dtype,
            "trainable_parameters": trainable,
            "blocks": len(train),
            "eval_blocks": len(held_out),
            "steps": steps,
            "tokens": curve.tokens,
            "training_seconds": round(curve.seconds, 3),
            "seconds": round(time.perf_counter() - began, 3),
            "tokens_per_second": round(curve.tokens / curve.seconds, 1) if curve.seconds else 0.0,
        }
        ctx.attributes |= {"r": params.r, "alpha": params.alpha, "dtype": dtype}


def _check_targets(model: ModelInfo, params: LoRA.Params, modules: Mapping[str, int]) -> Iterable[Problem]:
    have = ", ".join(f"{name} ({count})" for name, count in sorted(modules.items()))
    if params.target_modules is None:
        if not targets(model.config, params, modules):
            yield Problem("no linear layer to adapt was found", fix="name them in target_modules")
        return
    for name in params.target_modules:
        if name != "all-linear" and name.rpartition(".")[2] not in modules:
            close = get_close_matches(name, list(modules), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield Problem(
                f"the model has no module {name!r}", where="target_modules", fix=f"{hint}it has: {have}"
            )


def targets(config: Mapping[str, Any], params: LoRA.Params, modules: Iterable[str]) -> list[str] | str:
    """Modules to adapt: those named, else the architecture's custom, else every linear layer but the head."""
    if params.target_modules is not None:
        return "all-linear" if "all-linear" in params.target_modules else list(params.target_modules)
    known = _TARGETS.get(str(config.get("model_type", "")))
    have = set(modules)
    if known and set(known) <= have:
        return list(known)
    return sorted(have - {"lm_head", "embed_out"})


def _adapter_parameters(model: ModelInfo, params: LoRA.Params) -> int:
    names = {name.split(".")[-2] for name in model.tensors if name.endswith(".weight") and "." in name[:-7]}
    wanted = targets(model.config, params, names & _linear_names(model))
    total = 0
    for name, (_, shape) in model.tensors.items():
        parts = name.split(".")
        chosen = wanted == "all-linear" or (len(parts) > 1 and parts[-2] in wanted)
        if chosen and name.endswith(".weight") and len(shape) == 2:
            total += params.r * (shape[0] + shape[1])
    return total


def _seconds(
    model: ModelInfo, params: LoRA.Params, rate: float | None, adapter: int, train: Preview | None
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


def _linear_names(model: ModelInfo) -> set[str]:
    return {
        name.split(".")[-2]
        for name, (_, shape) in model.tensors.items()
        if name.endswith("_proj.weight") and len(shape) == 2
    }


def _native(ctx: PassContext) -> Dtype:
    return training_dtype(ctx.machine, ctx.accelerator.device)


def _data(ctx: PassContext, name: str) -> DataConfig:
    if name not in ctx.data:
        raise ConfigError(
            f"there is no data config called {name!r}", fix=f"there are: {', '.join(ctx.data) or 'none'}"
        )
    return ctx.data[name]


def _blocks(model: Artifact, params: LoRA.Params, ctx: PassContext) -> tuple[list[Any], list[Any]]:
    """Blocks to train on, and blocks to evaluate on."""
    from olive.data import blocks, rows, split, tokens

    tokenizer = tokens.load(model.path)
    seed = split.split_seed(params.training_args)
    config = _data(ctx, params.train_data_config)
    pre = config.pre_process_data_config
    train = rows.read(config, ctx.base_dir)
    held_out, held_pre = [], pre
    if params.eval_data_config:
        other = _data(ctx, params.eval_data_config)
        held_out, held_pre = rows.read(other, ctx.base_dir), other.pre_process_data_config
    elif params.eval_dataset_size:
        train, held_out = split.split_rows(train, params.eval_dataset_size, seed, pre)
    made = blocks.build(train, pre, tokenizer, seed)
    for note in made.notes:
        ctx.progress.note(str(note))
    ctx.facts |= {"rows": made.rows, "block_tokens": made.tokens, "label_tokens": made.trained_tokens}
    if not made.trained_tokens:
        raise ConfigError(
            f"none of the {made.tokens} tokens in {len(made)} blocks has a label: nothing would be learnt",
            fix="check train_on and the template's last field, or raise max_seq_len",
        )
    return list(made), list(blocks.build_held_out(held_out, held_pre, tokenizer, seed)) if held_out else []


def _model(model: Artifact, params: LoRA.Params, dtype: Dtype, ctx: PassContext) -> Any:
    """The base with fresh adapters and the packed attention."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from olive.hardware.memory import exempt_libraries
    from olive.models.hf import load_model
    from olive.passes.finetune import attention, trainer  # noqa: F401 - all imports before the weights

    exempt_libraries()
    if ctx.accelerator.device == "cpu":
        torch.set_num_threads(max(1, ctx.machine.cores))
    device = "cpu" if ctx.accelerator.device == "cpu" else "cuda"
    base = load_model(model.path, dtype=dtype, device=device, attn_implementation=attention.register())
    names = {
        name.rpartition(".")[2] for name, module in base.named_modules() if type(module) is torch.nn.Linear
    }
    set_seed(int(params.training_args.get("seed", 42)))
    config = LoraConfig(
        r=params.r,
        lora_alpha=params.alpha,
        lora_dropout=params.lora_dropout,
        target_modules=targets(base.config.to_dict(), params, names),
        modules_to_save=list(params.modules_to_save) if params.modules_to_save else None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(
            f"the adapter does not fit the model: {error}", fix="correct target_modules"
        ) from error


def _train(
    peft_model: Any, params: LoRA.Params, ctx: PassContext, dtype: str, train: list[Any], held_out: list[Any]
) -> tuple[Any, int]:
    """Train, or go on from the newest checkpoint; returns the curve and the number of optimizer steps."""
    import tempfile

    from olive.passes.finetune import patch
    from olive.passes.finetune.batches import Blocks
    from olive.passes.finetune.trainer import Curve, PackedTrainer, install_loss

    device = ctx.accelerator.device
    curve = Curve()
    with tempfile.TemporaryDirectory() as scratch:
        known, notes = arguments.prepare(
            params.training_args, folder=Path(scratch), dtype=dtype, device=device, has_eval=bool(held_out)
        )
        for note in notes:
            ctx.progress.note(note)
        args = arguments.build(known)
        ctx.facts["micro_batch"] = _fuse(args, train, held_out, device)
        ctx.facts["fused_head"] = install_loss(peft_model.get_base_model())
        ctx.facts["fused_layers"] = patch.patch(peft_model)
        trainer = PackedTrainer(
            peft_model,
            args,
            Blocks(train),
            Blocks(held_out) if held_out else None,
            journal=ctx.journal,
            progress=ctx.progress,
            curve=curve,
            save_seconds=60.0 if arguments.timed_saves(params.training_args) else None,
        )
        steps = trainer.run(ctx.journal.newest())
        ctx.facts["checkpoints"] = [str(finding) for finding in ctx.journal.findings]
    patch.unpatch(peft_model)
    return curve, steps


def _fuse(args: Any, train: list[Any], held_out: list[Any], device: str) -> dict[str, int]:
    """Re-cut the optimizer step into forward passes that fill the token budget."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    given = args.per_device_train_batch_size
    budget = arguments.BUDGET["cpu" if device == "cpu" else "gpu"]
    if not args.dataloader_drop_last and not args.auto_find_batch_size:
        size = arguments.micro_batch([len(block.ids) for block in train], rows, budget)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = size, rows // size
    if held_out:
        mean = sum(len(block.ids) for block in held_out) / len(held_out)
        args.per_device_eval_batch_size = max(1, int(budget // mean))
    return {
        "rows": args.per_device_train_batch_size,
        "accumulation_steps": args.gradient_accumulation_steps,
        "rows_given": given,
        "rows_of_a_step": rows,
    }


def _save(peft_model: Any, model: Artifact, out: Path) -> None:
    """The adapter, naming its base by the folder's name; nothing needs that name to load it."""
    for config in peft_model.peft_config.values():
        config.base_model_name_or_path = model.path.name
        config.inference_mode = True
    peft_model.save_pretrained(str(out), safe_serialization=True, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    if not (out / "adapter_model.safetensors").exists():
        raise PassFailed("PEFT wrote no adapter_model.safetensors", fix="Install a tested version of peft.")
