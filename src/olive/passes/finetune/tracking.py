"""Experiment trackers beside a training: TensorBoard, MLflow, Weights & Biases. Off unless asked for.

What they write stays in a folder of this machine unless the environment says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from olive.errors import Problem

FOLDER = "tracking"


@dataclass(frozen=True, slots=True)
class Tracker:
    """A tracker.

    Attributes:
        module: what it imports.
        folder: environment variable that says where it writes; ours unless set.
        form: how that variable spells a folder.
        defaults: environment variables that are set unless the user has set them.
        always: environment variables that are set in any case: no telemetry.
    """

    module: str
    folder: str
    form: str
    defaults: dict[str, str]
    always: dict[str, str]


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("tensorboard", "TENSORBOARD_LOGGING_DIR", "{folder}/tensorboard/{run}", {}, {}),
    "mlflow": Tracker(
        "mlflow",
        "MLFLOW_TRACKING_URI",
        "file://{folder}/mlflow",
        {"MLFLOW_EXPERIMENT_NAME": "olive", "MLFLOW_ALLOW_FILE_STORE": "true"},
        {"MLFLOW_DISABLE_TELEMETRY": "true"},
    ),
    "wandb": Tracker(
        "wandb",
        "WANDB_DIR",
        "{folder}",
        {
            "WANDB_MODE": "offline",
            "WANDB_PROJECT": "olive",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_CODE": "true",
            "WANDB_DISABLE_GIT": "true",
        },
        {"WANDB_ERROR_REPORTING": "false"},
    ),
}


def asked(training_args: Mapping[str, Any]) -> list[str]:
    """Names of the trackers that ``report_to`` asks for; ``all`` are those that are installed."""
    given = training_args.get("report_to")
    names = [given] if isinstance(given, str) else list(given or ())
    if "all" in names:
        return [name for name, tracker in TRACKERS.items() if find_spec(tracker.module) is not None]
    return [str(name) for name in dict.fromkeys(names) if name != "none"]


def check(training_args: Mapping[str, Any]) -> Iterator[Problem]:
    """Trackers that are not known or not installed."""
    for name in asked(training_args):
        if name not in TRACKERS:
            yield Problem(
                f"report_to names {name!r}, which is no tracker",
                "training_args",
                f"Known are {', '.join(TRACKERS)}, all and none.",
            )
        elif find_spec(TRACKERS[name].module) is None:
            yield Problem(
                f"report_to names {name}, and {TRACKERS[name].module} is not installed",
                "training_args",
                "pip install 'olive-next[tracking]'",
                exit_code=5,
            )


@contextmanager
def environment(names: list[str], folder: Path, run: str) -> Iterator[None]:
    """Let trackers write below ``folder``, on this machine alone, where the user says nothing else.

    Args:
        names: of the trackers.
        folder: theirs.
        run: name of the run.
    """
    wanted: dict[str, str] = {}
    for tracker in (TRACKERS[name] for name in names):
        usual = {tracker.folder: tracker.form.format(folder=folder.absolute(), run=run), **tracker.defaults}
        wanted |= {key: value for key, value in usual.items() if key not in os.environ} | tracker.always
    before = {key: os.environ.get(key) for key in wanted}
    os.environ |= wanted
    if "wandb" in names:
        # it falls back to a temporary folder where this one is not there
        Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
