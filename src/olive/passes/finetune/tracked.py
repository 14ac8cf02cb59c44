"""What trackers are told in a training: the points of our curve, through transformers' own callbacks.

Imported only where torch already is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from olive.passes.base import Progress

_SECRET = ("KEY", "TOKEN", "PASSWORD", "SECRET")


class Tracking(TrainerCallback):
    """Hands our numbers on, and lets a tracker that fails go.

    Args:
        names: of the trackers.
        progress: where to say that one of them failed.
        curve: the points so far; grows while training runs.
        every: steps between two points told.
    """

    def __init__(
        self, names: list[str], progress: Progress, curve: list[dict[str, float]], every: int
    ) -> None:
        self._progress, self._curve, self._every = progress, curve, every
        self._trackers: dict[str, Any] = {}
        for name in names:
            made = self._guarded(name, partial(_make, name))
            if made is not None:
                self._trackers[name] = made

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin; a run that goes on from a checkpoint tells the steps before it too."""
        self._each("on_train_begin", args, state, control, **kwargs)
        for point in self._curve:
            self._tell(args, state, control, point, without="tensorboard")  # its folder has them already

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the step."""
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            self._tell(args, state, control, self._curve[-1])

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the evaluation."""
        last = self._curve[-1]
        self._tell(args, state, control, {"step": last["step"], "eval_loss": last["eval_loss"]})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End, and write out what a tracker still holds."""
        self._each("on_train_end", args, state, control, **kwargs)
        for name in list(self._trackers):
            self._guarded(name, partial(_finish, name))
        self._trackers.clear()

    def _tell(
        self, args: Any, state: Any, control: Any, point: Mapping[str, float], without: str = ""
    ) -> None:
        there = copy.copy(state)
        there.global_step = int(point["step"])
        logs = {name: value for name, value in point.items() if name != "step"}
        self._each("on_log", args, there, control, without=without, logs=logs)

    def _each(self, event: str, *given: Any, without: str = "", **kwargs: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            if name != without:
                self._guarded(name, lambda: getattr(tracker, event)(*given, **kwargs))  # noqa: B023 - at once

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it raises, training goes on
            self._trackers.pop(name, None)
            said = _without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
            self._progress.note(f"report_to {name} failed, and training goes on without it: {said}")
            with suppress(Exception):
                _finish(name)
            return None


def _make(name: str) -> Any:
    return get_reporting_integration_callbacks([name])[0]()


def _finish(name: str) -> None:
    if name == "mlflow":
        import mlflow

        mlflow.flush_async_logging()
        mlflow.end_run()
    elif name == "wandb":
        import wandb

        wandb.finish()


def _without_secrets(text: str) -> str:
    """``text`` without the values that the environment keeps under a secret's name."""
    for name, value in os.environ.items():
        if len(value) > 5 and any(part in name.upper() for part in _SECRET):
            text = text.replace(value, "[redacted]")
    return text
