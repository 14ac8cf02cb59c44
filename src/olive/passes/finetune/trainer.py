"""transformers' Trainer with packed micro-batches, the fused loss and journalled checkpoints.

transformers sees one batch an optimizer step: all its rows. Each process takes its share of them, in forward
passes that fit its memory. Imported only where torch already is.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer

from olive.errors import OutOfMemory, PassFailed
from olive.passes.base import Progress
from olive.passes.finetune import checkpoints
from olive.passes.finetune.batches import Blocks, Order, TokenBlock, collate, labelled, told
from olive.passes.finetune.cuts import cut, share
from olive.passes.finetune.decoder import HostEmbedding
from olive.passes.finetune.follow import Follow, stopping_after_the_step
from olive.passes.finetune.loss import IGNORE
from olive.passes.finetune.memory import Passes
from olive.passes.finetune.parallel import World, is_sharded
from olive.passes.finetune.patch import compute_twice
from olive.passes.finetune.stopping import Curve
from olive.store.journal import Checkpoint, Journal

_AT_ONCE = 256  # rows to evaluate on that are in memory together


class PackedTrainer(Trainer):
    """Trains on packed blocks.

    Args:
        model: PEFT model whose causal model went through ``install_loss``.
        args: arguments; the batch size is that of the whole optimizer step.
        train: blocks to train on.
        held_out: blocks to evaluate on.
        passes: how a step is cut; made smaller where memory runs out.
        may_checkpoint: whether activations may be computed twice when memory runs out.
        world: the processes that train together.
        journal: where checkpoints go.
        progress: where to say how far training is.
        curve: points already known, and where new ones go.
        save_seconds: training time between checkpoints; None when the arguments say when to save.
    """

    control: Any
    runs_ahead = True
    collate = staticmethod(collate)

    def __init__(
        self,
        model: Any,
        args: Any,
        train: Blocks,
        held_out: Blocks | None,
        *,
        passes: Passes,
        may_checkpoint: bool = True,
        world: World | None = None,
        journal: Journal,
        progress: Progress,
        curve: Curve,
        save_seconds: float | None = 60.0,
    ) -> None:
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        args._n_gpu = min(1, args.n_gpu)  # else the batch grows with every GPU in sight
        super().__init__(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, data_collator=list
        )
        self.smoothing = smoothing
        self.passes, self.may_checkpoint, self.world = passes, may_checkpoint, world or World()
        self.remove_callback(PrinterCallback)
        self.follow = Follow(self, save_seconds)
        self.add_callback(self.follow)
        self.journal, self.progress, self.curve = journal, progress, curve
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.sharded = any(is_sharded(p) for p in model.parameters())
        # walking over a model's modules to find them takes as long as a forward pass of a small model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.best: dict[str, torch.Tensor] | None = None
        self.losses: list[torch.Tensor] = []
        self.rows: list[TokenBlock] = []
        self.step_tokens = 0
        self.stop: int | None = None
        self.said = ""
        self.most_passes = 0
        self.embeds_on_host = any(isinstance(module, HostEmbedding) for module in model.modules())
        if self.world.rank:  # other dropout than the first process
            torch.manual_seed(args.seed + self.world.rank)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Blocks = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self.args.per_device_train_batch_size
        return Order(data.sizes, strategy, seed, rows)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        return sum(labelled(block) for batch in batch_samples for block in batch)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if getattr(self.args, "include_num_input_tokens_seen", "no") not in ("no", False):
            self.state.num_input_tokens_seen += sum(len(block.ids) for block in inputs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the batch's labels, divided by the labels of the whole optimizer step."""
        outputs = model(**inputs, olive_loss=True, label_smoothing=self.smoothing if model.training else 0.0)
        count = num_items_in_batch or inputs["kept"].numel()
        loss = outputs.loss / max(1, count)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Every forward and backward pass of one optimizer step; the loss is read when the step ends.

        A step that does not fit into memory is done again in smaller passes: nothing was changed by it.

        Args:
            model: the model.
            inputs: the rows of the step.
            num_items_in_batch: labels in them.
        """
        self.rows = inputs
        self.step_tokens += sum(len(block.ids) for block in inputs)
        if not model.training:
            model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        while True:
            losses = self._attempt(model, inputs, num_items_in_batch)
            (failed,) = self.world.any(losses is None) if not self.sharded else (losses is None,)
            if not failed:
                break
            self._take_less(inputs)
        self.world.sum_gradients(self.trained)
        # read at the end of the step: asking now would hold up what a GPU has yet to be given
        self.losses += losses or []
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _attempt(self, model: Any, rows: list[TokenBlock], count: int) -> list[torch.Tensor] | None:
        """The losses of this process's passes, their gradients added up; None when memory ran out."""
        # gradients of sharded weights are averaged over the processes
        grow = self.world.size if self.sharded else 1
        losses = []
        try:
            passes = self._passes(rows)
            self.most_passes = max(self.most_passes, len(passes))
            for inputs in passes:
                prepared = self._prepare_inputs(inputs)
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, prepared, num_items_in_batch=count)
                self.accelerator.backward(loss * grow)
                losses.append(loss.detach())
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            self.said = str(error).split("\n")[0]
        else:
            return losses
        if self.sharded:  # the others wait inside their layers: all have to begin again
            raise OutOfMemory(f"memory ran out in step {self.state.global_step + 1}: {self.said}")
        return None

    def _passes(self, rows: Sequence[TokenBlock]) -> list[dict[str, Any]]:
        """This process's forward passes over ``rows``, as many as the others' where weights are sharded."""
        mine = [self._cut(rows, part) for part in share([len(row.ids) for row in rows], self.world.size)]
        made = [self.collate(part) for part in mine[self.world.rank]]
        if self.sharded:
            idle = self.collate(rows[:1])
            idle["labels"] = torch.full_like(idle["labels"], IGNORE)
            made += [idle] * (max(map(len, mine)) - len(made))
        return made

    def _cut(self, rows: Sequence[TokenBlock], part: list[int]) -> list[list[TokenBlock]]:
        lengths = [len(rows[row].ids) for row in part]
        return [[rows[part[i]] for i in indices] for indices in cut(lengths, self.passes.tokens)]

    def _take_less(self, rows: Sequence[TokenBlock]) -> None:
        """Cut smaller after memory ran out: half the tokens, or activations computed twice, or give up."""
        self.forget()
        self._forget_gradients()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        parts = share([len(row.ids) for row in rows], self.world.size)
        tried = [cut_ for part in parts for cut_ in self._cut(rows, part)]
        tokens = max(sum(len(row.ids) for row in cut_) for cut_ in tried)
        where = f"memory ran out in step {self.state.global_step + 1} with {tokens} tokens a forward pass"
        if self.said:
            where += f" ({self.said})"
        if any(len(cut_) > 1 for cut_ in tried):
            self.passes = replace(self.passes, tokens=max(1, tokens // 2))
            self.progress.note(f"{where}; going on with {self.passes.tokens} of them at once")
        elif self.may_checkpoint and not self.passes.checkpointing:
            self.passes = replace(self.passes, checkpointing=True)
            compute_twice(self.model)
            self.progress.note(f"{where}; going on with activations computed twice")
        else:
            raise OutOfMemory(
                f"{where}, one row at a time"
                + (" and activations computed twice" if self.passes.checkpointing else ""),
                fix="Lower max_seq_len or the rank, use QLoRA, or use a larger device."
                if self.passes.checkpointing
                else "Take gradient_checkpointing: false out, lower max_seq_len, or use a larger device.",
            )

    def _prepare_inputs(self, inputs: Any) -> Any:
        """A pass on the device, with the numbers of the tokens that have a label."""
        kept = (inputs["labels"].flatten() != IGNORE).nonzero().squeeze(1)
        on_host = ("input_ids",) if self.embeds_on_host else ()
        return {
            name: self._there(value) if torch.is_tensor(value) and name not in on_host else value
            for name, value in {**inputs, "kept": kept}.items()
        }

    def _there(self, value: torch.Tensor) -> torch.Tensor:
        device = self.args.device
        # from memory that may move, a copy would wait for all that a GPU has yet to do
        return value if device.type == "cpu" else value.pin_memory().to(device, non_blocking=True)

    def read_losses(self, losses: Sequence[torch.Tensor], step: int, rows: Sequence[TokenBlock]) -> float:
        """The loss of a step; stops on one that is no number.

        Args:
            losses: of its forward passes here.
            step: its number.
            rows: what it trained on.
        """
        values = [float(loss) for loss in losses]
        whole = float(self.world.total(torch.tensor(sum(values), dtype=torch.float64)))
        if not math.isfinite(whole):
            bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
            raise PassFailed(
                f"the loss became {whole} in step {step}{self._among(rows, bad, len(values))}",
                fix="Lower learning_rate, or train in float32; look at the rows where it comes back.",
            )
        return whole

    def _among(self, step: Sequence[TokenBlock], bad: int | None, passes: int) -> str:
        """Which forward pass and rows of the step a message is about; nothing where they are another's."""
        if bad is None:
            return ""
        part = share([len(row.ids) for row in step], self.world.size)[self.world.rank]
        rows = told(self._cut(step, part)[bad], self.train_dataset.decode)
        return (f", forward pass {bad + 1} of {passes}" if passes > 1 else "") + f", on {rows}"

    def figures(self) -> dict[str, float]:
        """What else is known of the forward passes since it was last asked, by name; asking forgets them.

        A ``loss`` among them is the loss of an evaluation, in place of the mean over label tokens. Every
        process has to ask.
        """
        return {}

    def forget(self) -> None:
        """Forget the forward passes since ``figures`` was last asked: they are done again."""

    def floating_point_ops(self, inputs: Any) -> int:
        """4 a parameter and token: the weights are frozen, so there is no gradient of them."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(p.numel() for p in self.model.parameters())
        return int(4 * self._parameters * sum(len(block.ids) for block in inputs))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """Mean loss a label token over the evaluation rows."""
        self.follow.catch_up()
        blocks = (self.eval_dataset if eval_dataset is None else eval_dataset).blocks
        sums, began = torch.zeros(2, dtype=torch.float64), time.perf_counter()
        self.model.eval()
        for start in range(0, len(blocks), _AT_ONCE):
            rows = [blocks[row] for row in range(start, min(start + _AT_ONCE, len(blocks)))]
            for batch in self._passes(rows):
                inputs = self._prepare_inputs(batch)
                labels = inputs["kept"].numel()
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss = float(self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=1))
                sums += torch.tensor([loss, labels], dtype=torch.float64)
        self.model.train()
        total, count = self.world.total(sums).tolist()
        found = {"loss": total / max(1, count)} | self.figures()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics, trial))
        if better and self.args.load_best_model_at_end:
            self.best = checkpoints.trained_state(self.model)
        return better

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.follow.catch_up()  # stops on a loss that is no number before anything is saved
        self.store_flos()
        state = {
            "points": self.curve.points,
            "tokens": self.curve.tokens,
            "seconds": self.curve.seconds,
            "done": self.curve.stopped or self.state.global_step >= self.state.max_steps,
        }
        write = self.checkpoint()
        if self.world.first:
            self.journal.commit(self.state.global_step, write, state)
        self.world.wait()

    def checkpoint(self) -> Callable[[Path], None]:
        """Everything that resuming needs, as a function that writes it into a folder; all have to ask."""
        return checkpoints.write(self, self.best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoints.load_trained(self.model, checkpoints.weights(folder))
        self.best = checkpoints.best_weights(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = checkpoints.read(Path(checkpoint))
            checkpoints.load_optimizer(self.optimizer, state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            state = checkpoints.read(Path(checkpoint))["scaler"]
            if state is not None:
                scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.set_rng_state(checkpoints.read(Path(checkpoint))["rng"], self.world.rank)

    def run(self, checkpoint: Checkpoint | None) -> int:
        """Train to the end, from ``checkpoint`` where there is one; returns the steps done in all.

        The best weights, where they are asked for, are in ``best`` and not yet in the model.
        """
        if checkpoint is not None:
            kept = checkpoint.state
            self.curve.points[:] = kept["points"]
            self.curve.tokens, self.curve.seconds = kept["tokens"], kept["seconds"]
            self.progress.note(f"going on from the checkpoint of step {checkpoint.step}")
        if checkpoint is not None and checkpoint.state["done"]:
            # the Trainer would do one step too many
            self._load_from_checkpoint(str(checkpoint.path))
            self.state.global_step = checkpoint.step
        else:
            self.model.__dict__["zero_grad"] = self._forget_gradients
            try:
                with stopping_after_the_step(self):
                    self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
            finally:
                del self.model.__dict__["zero_grad"]
        return int(self.state.global_step)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        text in said
        for text in (
            *("can't allocate memory", "CUDA out of memory", "STATUS_ALLOC_FAILED"),
            *("could not create a primitive", "could not create a memory"),  # of oneDNN
        )
    )
