"""What happens around the steps of training: signals, progress, the curve, saving by the clock.

Imported only where torch already is.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from olive.hardware import signals
from olive.passes.finetune import checkpoints
from olive.passes.finetune.fused import Factors

if TYPE_CHECKING:
    from olive.passes.finetune.trainer import PackedTrainer


@contextmanager
def stopping_after_the_step(trainer: PackedTrainer) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end training with a checkpoint, and then do what they always do.

    The second signal does that at once.
    """

    def ask(number: int, frame: Any) -> None:
        trainer.stop = number
        usual()
        trainer.progress.note("stopping after this step, with a checkpoint; once more stops now")

    with signals.caught(ask) as usual:
        yield
    if trainer.stop is not None:
        signals.end_by(trainer.stop)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step whose loss may not be known yet: its number, losses, rows, tokens, start and learning rate."""

    number: int
    losses: list[Any]
    rows: Any
    tokens: int
    began: float
    rate: float


class Follow(TrainerCallback):
    """Progress, the curve, and saving by the clock."""

    def __init__(self, trainer: PackedTrainer, save_seconds: float | None) -> None:
        self.trainer, self.save_seconds = trainer, save_seconds
        self.began = self.saved = self.read = time.perf_counter()
        self.rate = 0.0
        self.at_once = False
        self.waiting: list[_Step] = []
        self.start: dict[str, float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.trainer.progress.start("training", state.max_steps)
        self.trainer.progress.update(state.global_step)
        self.trainer.model.train()  # a fresh adapter says so, and the base under it was loaded for evaluation
        if hasattr(self.trainer.model, "peft_config"):
            self.start = checkpoints.sums(checkpoints.trained_state(self.trainer.model))
        self.began = self.saved = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the step."""
        Factors.generation += 1
        self.began = time.perf_counter()
        self.trainer.step_tokens = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the rate before the scheduler moves it."""
        self.rate = float(self.trainer._get_learning_rate())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Put the step into the curve; say whether to save or to stop."""
        Factors.generation += 1
        trainer = self.trainer
        self.waiting.append(
            _Step(state.global_step, trainer.losses, trainer.rows, trainer.step_tokens, self.began, self.rate)
        )
        trainer.losses = []
        # a GPU is given the next step before the loss of this one is asked for
        ahead = trainer.args.device.type == "cuda" and trainer.world.size == 1 and not self.at_once
        self.catch_up(leaving=1 if ahead and trainer.runs_ahead else 0)
        now = time.perf_counter()
        due = self.save_seconds is not None and (
            state.global_step >= state.max_steps or now - self.saved >= self.save_seconds
        )
        stopping, saving = trainer.world.any(trainer.stop is not None, due)
        if stopping:
            trainer.stop = trainer.stop or signal.SIGTERM  # of another process
            control.should_training_stop = True
        if self.start is not None and self.rate > 0:
            checkpoints.prove(trainer, self.start)
            self.start = None
        if stopping or saving:
            control.should_save = True
            self.saved = now
        return control

    def catch_up(self, leaving: int = 0) -> None:
        """Put the steps that wait into the curve, but for the last ``leaving``.

        Raises:
            PassFailed: a loss is no number.
        """
        trainer = self.trainer
        while len(self.waiting) > leaving:
            step = self.waiting.pop(0)
            loss, now = trainer.read_losses(step.losses, step.number, step.rows), time.perf_counter()
            seconds = max(now - max(step.began, self.read), 1e-9)
            self.read = now
            speed = step.tokens / seconds
            trainer.curve.tokens += step.tokens
            trainer.curve.seconds += seconds
            figures = {name: value for name, value in trainer.figures().items() if name != "loss"}
            trainer.curve.points.append(
                {
                    "step": step.number,
                    "loss": loss,
                    "tokens_per_second": speed,
                    "learning_rate": step.rate,
                    **figures,
                }
            )
            trainer.progress.update(step.number, loss=round(loss, 4), tokens_per_second=round(speed, 1))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        """Put the evaluation into the curve; say whether it is the one to stop at."""
        found = {name: float(value) for name, value in (metrics or {}).items() if name != "eval_runtime"}
        points = self.trainer.curve.points
        if points and points[-1]["step"] == state.global_step:
            points[-1] |= found
        else:
            points.append({"step": state.global_step, **found})
        if self.trainer.curve.stopped:
            self.trainer.progress.note(f"stopping early at step {state.global_step}")
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self.catch_up()
        self.trainer.progress.finish()
