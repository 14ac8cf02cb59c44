"""The one unit a host executes: everything a pass needs, as a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olive.config.base import Frozen
from olive.config.workflow import Accelerator, DataConfig
from olive.errors import Problem
from olive.models.artifact import Artifact


class Kept(Frozen):
    """Where a job finds and keeps statistics of its model, as ``Statistics`` takes it.

    Attributes:
        root: the store's folder.
        parts: what every statistic of the step depends on.
        data: name of a data config -> what identifies its rows.
    """

    root: Path
    parts: dict[str, Any]
    data: dict[str, Any] = {}


class Job(Frozen):
    """One pass on one model.

    Attributes:
        step: name of the step in the document.
        type: name of the pass.
        params: its parameters, as JSON.
        model: what it works on.
        data: the data configs it may read.
        base_dir: folder that relative data paths are looked up in.
        accelerator, target: where it runs and what it makes the model for.
        out: empty staging folder.
        journal: folder of the step's checkpoints.
        tracking: folder for experiment trackers.
        statistics: where statistics are kept; None for nowhere.
        processes: how many processes run it together, on all hosts.
        strategy: how they share the model: ``ddp`` or ``fsdp``.
        hosts, host: how many machines they run on, and which of them this is.
        address: ``name:port`` of the first, where there are several.
    """

    step: str
    type: str
    params: dict[str, Any]
    model: Artifact
    data: dict[str, DataConfig]
    base_dir: Path
    accelerator: Accelerator
    target: Accelerator
    out: Path
    journal: Path
    tracking: Path | None = None
    statistics: Kept | None = None
    processes: int = 1
    strategy: str = "ddp"
    hosts: int = 1
    host: int = 0
    address: str | None = None

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"step {self.step} ({self.type})"


class JobResult(Frozen):
    """What a job reports beside the files it wrote.

    Attributes:
        attributes: attributes of the artifact.
        facts, series: kept with the step's result.
        seconds: wall time.
        peak_memory: resident bytes at the peak.
        findings: what was wrong and could be mended, e.g. a damaged checkpoint.
    """

    attributes: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    series: dict[str, list[dict[str, float]]] = {}
    seconds: float
    peak_memory: int
    findings: tuple[Problem, ...] = ()
