"""Train a prepared model on blocks: how the work is cut, what is patched, where it goes on from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from olive.hardware.probe import memory_available
from olive.passes.base import PassContext
from olive.passes.finetune import arguments, checkpoints, decoder, memory, parallel, patch, tracking
from olive.passes.finetune.base_weights import QuantisedLinear
from olive.passes.finetune.batches import Blocks
from olive.passes.finetune.head import install_loss
from olive.passes.finetune.loss import use_small_blocks
from olive.passes.finetune.memory import SMALL_BLOCK, Passes
from olive.passes.finetune.parallel import World
from olive.passes.finetune.stopping import Curve, Patience
from olive.passes.finetune.trainer import PackedTrainer
from olive.passes.finetune.training_data import TrainingData
from olive.store.journal import Checkpoint


def train_blocks(
    tuned: Any,
    given: Mapping[str, Any],
    ctx: PassContext,
    dtype: str,
    data: TrainingData,
    make: Callable[..., PackedTrainer],
) -> tuple[Curve, int]:
    """Train, or go on from the newest checkpoint.

    Args:
        tuned: the model, on its device; the trained weights are whole and on it afterwards.
        given: ``training_args`` of the document.
        ctx: of the pass; gets facts.
        dtype: of the base.
        data: rows to train on, and to evaluate on, which may be none.
        make: what trains, called with the arguments of ``PackedTrainer``.

    Returns:
        The curve, and the number of optimizer steps.
    """
    device, world = ctx.accelerator.device, parallel.join(ctx.accelerator.device)
    train, held_out = Blocks(data.train, data.decode), Blocks(data.held_out, data.decode)
    curve = Curve(patience=Patience.of(given) if len(held_out) else None)
    with tempfile.TemporaryDirectory() as scratch:
        known, notes = arguments.prepare(
            given, folder=Path(scratch), dtype=dtype, device=device, has_eval=len(held_out) > 0
        )
        for note in notes:
            ctx.progress.note(note)
        args = arguments.build(known)
        causal = causal_of(tuned)
        ctx.facts["fused_head"] = install_loss(causal)
        ctx.facts["fused_layers"] = patch.patch(tuned)
        passes = _passes(tuned, args, given, ctx, dtype, train)
        if passes.offload:
            ctx.facts["embedding_on_host"] = decoder.embedding_to_host(causal)
        checkpoint = _newest(ctx, world)
        if sharding := ctx.place.strategy == "fsdp" and world.size > 1:
            for module in tuned.modules():
                if isinstance(module, QuantisedLinear):
                    module.look_like_floats()
            parallel.shard(tuned, _layers(causal))
        trainer = make(
            tuned,
            args,
            train,
            held_out if len(held_out) else None,
            passes=passes,
            may_checkpoint=given.get("gradient_checkpointing") is not False,
            world=world,
            journal=ctx.journal,
            progress=ctx.progress,
            curve=curve,
            save_seconds=60.0 if arguments.timed_saves(given) else None,
        )
        with _tracked(trainer, given, ctx):
            steps = trainer.run(checkpoint)
        if args.load_best_model_at_end and trainer.best is not None:
            checkpoints.load_trained(tuned, trainer.best)
        if sharding:
            parallel.unshard(tuned, trained_only=hasattr(tuned, "peft_config"))
        ctx.facts["checkpoints"] = [str(finding) for finding in ctx.journal.findings]
    ctx.facts["micro_batch"] = _cutting(args, given, trainer)
    patch.unpatch(tuned)
    return curve, steps


@contextmanager
def _tracked(trainer: PackedTrainer, given: Mapping[str, Any], ctx: PassContext) -> Iterator[None]:
    """Tell the trackers that the document asks for; one process does."""
    names = tracking.asked(given) if trainer.world.first else []
    run = f"{ctx.step}-{ctx.journal.path.name[:8]}"
    with tracking.environment(names, ctx.tracking or ctx.base_dir / tracking.FOLDER, run):
        if names:
            from olive.passes.finetune.tracked import Tracking

            trainer.follow.at_once = True
            trainer.args.run_name = trainer.args.run_name or run
            every = max(1, int(given.get("logging_steps", 1)))
            trainer.add_callback(Tracking(names, ctx.progress, trainer.curve.points, every))
        yield


def _passes(
    tuned: Any, args: Any, given: Mapping[str, Any], ctx: PassContext, dtype: str, train: Blocks
) -> Passes:
    """How a step is cut; the rows of a whole step become the batch that transformers sees."""
    device = ctx.accelerator.device
    autocast = args.bf16 or args.fp16
    chosen = memory.choose(
        tuned.config.to_dict(),
        width=2 if autocast else getattr(torch, dtype).itemsize,
        free=_free(device, ctx),
        trained=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        moments=2 if "8bit" in str(args.optim) else 8,
        longest=max(train.sizes),
        device=device,
        fused=not autocast and ctx.facts["fused_layers"]["lora"] > 0,
        checkpointing=given.get("gradient_checkpointing"),
        embedding=_embedding(tuned),
    )
    if ctx.place.attempt:  # memory ran out where the processes had to begin again
        if chosen.checkpointing or given.get("gradient_checkpointing") is False:
            chosen = Passes(max(1, chosen.tokens >> ctx.place.attempt), chosen.checkpointing)
        else:
            chosen = Passes(max(1, chosen.tokens >> (ctx.place.attempt - 1)), True)
    args.per_device_train_batch_size *= args.gradient_accumulation_steps
    args.gradient_accumulation_steps = 1
    args.gradient_checkpointing = False
    if chosen.checkpointing:
        patch.compute_twice(tuned, offload=chosen.offload)
    if chosen.offload:
        use_small_blocks(SMALL_BLOCK)
    return chosen


def _embedding(tuned: Any) -> int:
    """Bytes of an embedding that may wait in the host's memory."""
    causal = causal_of(tuned)
    embedding = causal.get_input_embeddings()
    may = decoder.embedding_may_wait(embedding, causal.get_output_embeddings())
    return int(embedding.weight.nbytes) if may else 0


def causal_of(tuned: Any) -> Any:
    """The causal language model below its adapters."""
    return tuned.get_base_model() if hasattr(tuned, "get_base_model") else tuned


def _free(device: str, ctx: PassContext) -> int:
    """Bytes free on the device with the model on it."""
    if device == "cpu":
        return memory_available() // ctx.place.local_size
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total) - torch.cuda.memory_reserved()
    return min(free, allowed)


def _newest(ctx: PassContext, world: World) -> Checkpoint | None:
    """The newest whole checkpoint, looked for by one process."""
    found = ctx.journal.newest() if world.first else None
    told = world.told(None if found is None else [found.step, str(found.path), found.state])
    return None if told is None else Checkpoint(told[0], Path(told[1]), told[2])


def _layers(causal: Any) -> list[Any]:
    """The decoder layers, as transformers names their classes."""
    names = set(getattr(causal, "_no_split_modules", None) or ())
    return [module for module in causal.modules() if type(module).__name__ in names]


def _cutting(args: Any, given: Mapping[str, Any], trainer: PackedTrainer) -> dict[str, Any]:
    """How a step was cut in the end, for the report."""
    rows = args.per_device_train_batch_size
    return {
        "rows_of_a_step": rows,
        "rows_given": int(given.get("per_device_train_batch_size", 1)),
        "processes": trainer.world.size,
        "tokens_of_a_pass": trainer.passes.tokens,
        "passes_of_a_step": trainer.most_passes,
        "activations_computed_twice": trainer.passes.checkpointing,
        "waiting_on_host": trainer.passes.offload,
    }
