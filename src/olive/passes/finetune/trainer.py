"""transformers' Trainer with packed micro-batches, the fused loss and journalled checkpoints.

Imported only where torch already is.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from olive.errors import PassFailed
from olive.passes.base import Progress
from olive.passes.finetune import checkpoints
from olive.passes.finetune.batches import Blocks, Order, collate
from olive.passes.finetune.fused import Factors
from olive.passes.finetune.loss import IGNORE, head_is_plain, linear_cross_entropy, reference_loss
from olive.passes.finetune.stopping import Curve
from olive.store.journal import Checkpoint, Journal


def install_loss(causal: Any) -> bool:
    """Let a causal language model return the sum of its losses over packed, already shifted labels.

    Returns:
        Whether the fused head is in use; False when the head is trained or the model does more than a linear
        layer to its hidden states, and the logits come from the model itself.
    """
    plain = causal.forward
    head = causal.get_output_embeddings()
    fused = head_is_plain(head) and _head_matches(causal, plain, head)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("olive_loss", False):
            return plain(*args, **kwargs)
        labels, smoothing = kwargs.pop("labels"), kwargs.pop("label_smoothing", 0.0)
        if fused:
            hidden = causal.base_model(*args, use_cache=False, **kwargs)[0]
            loss = linear_cross_entropy(
                hidden.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, smoothing=smoothing
            )
        else:
            keep = (labels.flatten() != IGNORE).nonzero().squeeze(1)
            logits = plain(*args, use_cache=False, logits_to_keep=keep, **kwargs).logits
            loss = reference_loss(logits.flatten(0, 1), labels.flatten()[keep], smoothing)
        return CausalLMOutput(loss=loss)

    causal.forward = forward
    return fused


def _head_matches(causal: Any, plain: Any, head: Any) -> bool:
    ids = torch.arange(4, device=head.weight.device)[None]
    was = causal.training
    causal.eval()
    with torch.no_grad():
        logits = plain(input_ids=ids, use_cache=False).logits.float()
        own = head(causal.base_model(input_ids=ids, use_cache=False)[0]).float()
    causal.train(was)
    return bool(torch.allclose(logits, own, rtol=1e-3, atol=1e-3 * float(own.abs().max() + 1e-6)))


class PackedTrainer(Trainer):
    """Trains on packed blocks.

    Args:
        model: PEFT model whose causal model went through ``install_loss``.
        args: arguments; batch sizes already fused.
        train: blocks to train on.
        held_out: blocks to evaluate on.
        journal: where checkpoints go.
        progress: where to say how far training is.
        curve: points already known, and where new ones go.
        save_seconds: training time between checkpoints; None when the arguments say when to save.
    """

    control: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        train: Blocks,
        held_out: Blocks | None,
        *,
        journal: Journal,
        progress: Progress,
        curve: Curve,
        save_seconds: float | None = 60.0,
    ) -> None:
        smoothing, args.label_smoothing_factor = args.label_smoothing_factor, 0.0
        super().__init__(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, data_collator=collate
        )
        self.smoothing = smoothing
        self.remove_callback(PrinterCallback)
        self.add_callback(_Follow(self, save_seconds))
        self.journal, self.progress, self.curve = journal, progress, curve
        self.args._n_gpu = min(1, self.args.n_gpu)
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self.best: dict[str, torch.Tensor] | None = None
        self.losses: list[torch.Tensor] = []
        self.batches: list[torch.Tensor] = []
        self.step_tokens = 0
        self.stop: int | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Blocks = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return Order(data.sizes, strategy, seed, rows)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        return sum(int((batch["labels"] != IGNORE).sum()) for batch in batch_samples)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the batch's labels, divided by the labels of the whole optimizer step."""
        outputs = model(**inputs, olive_loss=True, label_smoothing=self.smoothing if model.training else 0.0)
        count = num_items_in_batch or int((inputs["labels"] != IGNORE).sum())
        loss = outputs.loss / max(1, count)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One forward and backward; the loss is read when the step ends."""
        self.step_tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        # read at the end of the step: asking now would hold up what a GPU has yet to be given
        self.losses.append(loss.detach())
        self.batches.append(inputs["input_ids"])
        return loss

    def read_losses(self) -> float:
        """The loss of the step that ends; stops on one that is no number, before anything is saved."""
        values = [float(loss) for loss in self.losses]
        batches, self.batches = self.batches, []
        self.losses.clear()
        bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            raise PassFailed(
                f"the loss became {values[bad]} in step {self.state.global_step}"
                + (f", forward pass {bad + 1} of {len(values)}" if len(values) > 1 else "")
                + f", on {self.train_dataset.told(batches[bad].flatten().tolist())}",
                fix="Lower learning_rate, or train in float32; look at these rows where it comes back.",
            )
        return sum(values)

    def floating_point_ops(self, inputs: Any) -> int:
        """4 a parameter and token: the weights are frozen, so there is no gradient of them."""
        if not hasattr(self, "_parameters"):
            self._parameters = sum(p.numel() for p in self.model.parameters())
        return int(4 * self._parameters * inputs["input_ids"].numel())

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> Any:
        """Mean loss a label token over the evaluation rows."""
        total, count, began = 0.0, 0, time.perf_counter()
        self.model.eval()
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            labels = int((inputs["labels"] != IGNORE).sum())
            if labels:
                with torch.no_grad(), self.compute_loss_context_manager():
                    total += float(self.compute_loss(self.model_wrapped, inputs)) * labels
                count += labels
        self.model.train()
        metrics = {
            f"{metric_key_prefix}_loss": total / max(1, count),
            f"{metric_key_prefix}_runtime": time.perf_counter() - began,
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        better = bool(super()._determine_best_metric(metrics, trial))
        if better and self.args.load_best_model_at_end:
            self.best = checkpoints.trained_state(self.model)
        return better

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        state = {
            "points": self.curve.points,
            "tokens": self.curve.tokens,
            "seconds": self.curve.seconds,
            "done": self.curve.stopped or self.state.global_step >= self.state.max_steps,
        }
        self.journal.commit(
            self.state.global_step, lambda folder: checkpoints.write(folder, self, self.best), state
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        checkpoints.load_trained(self.model, load_file(folder / checkpoints.ADAPTER))
        if (folder / checkpoints.BEST).exists():
            self.best = load_file(folder / checkpoints.BEST)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = checkpoints.read(Path(checkpoint))
            self.optimizer.load_state_dict(state["optimizer"])
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            state = checkpoints.read(Path(checkpoint))["scaler"]
            if state is not None:
                scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.set_rng_state(checkpoints.read(Path(checkpoint))["rng"])

    def run(self, checkpoint: Checkpoint | None) -> int:
        """Train to the end, from ``checkpoint`` where there is one; returns the steps done in all."""
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
            with stopping_after_the_step(self):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.path))
        if self.args.load_best_model_at_end and self.best is not None:
            checkpoints.load_trained(self.model, self.best)
        return int(self.state.global_step)


@contextmanager
def stopping_after_the_step(trainer: PackedTrainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end training with a checkpoint, and then do what they always do.

    The second signal does that at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        trainer.stop = number
        for each, usual in before.items():
            signal.signal(each, usual)
        trainer.progress.note("stopping after this step, with a checkpoint; once more stops now")

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
    if trainer.stop is not None:
        signal.raise_signal(trainer.stop)


class _Follow(TrainerCallback):
    """Progress, the curve, and saving by the clock."""

    def __init__(self, trainer: PackedTrainer, save_seconds: float | None) -> None:
        self.trainer, self.save_seconds = trainer, save_seconds
        self.began = self.saved = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.progress.start("training", state.max_steps)
        self.trainer.progress.update(state.global_step)
        self.began = self.saved = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Factors.generation += 1
        self.began = time.perf_counter()
        self.trainer.step_tokens = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rate = float(self.trainer._get_learning_rate())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        Factors.generation += 1
        trainer = self.trainer
        step_loss, now = trainer.read_losses(), time.perf_counter()
        speed = trainer.step_tokens / max(now - self.began, 1e-9)
        trainer.curve.tokens += trainer.step_tokens
        trainer.curve.seconds += now - self.began
        trainer.curve.points.append(
            {
                "step": state.global_step,
                "loss": step_loss,
                "tokens_per_second": speed,
                "learning_rate": self.rate,
            }
        )
        trainer.progress.update(
            state.global_step, loss=round(step_loss, 4), tokens_per_second=round(speed, 1)
        )
        if trainer.stop is not None:
            control.should_save = control.should_training_stop = True
            return control
        if self.save_seconds is not None:
            last = state.global_step >= state.max_steps
            if last or now - self.saved >= self.save_seconds:
                control.should_save = True
                self.saved = now
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        loss = float((metrics or {}).get("eval_loss", math.nan))
        points = self.trainer.curve.points
        if points and points[-1]["step"] == state.global_step:
            points[-1]["eval_loss"] = loss
        else:
            points.append({"step": state.global_step, "eval_loss": loss})
        if self.trainer.curve.stopped:
            self.trainer.progress.note(
                f"stopping early at step {state.global_step}: eval_loss no longer falls"
            )
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.progress.finish()
