"""The contract of a pass."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from olive.config.base import Frozen, PassParams
from olive.config.workflow import Accelerator, DataConfig, Devices
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.passes.bits import PlannedBits
from olive.store.journal import Journal
from olive.store.statistics import Statistics

P = TypeVar("P", bound=PassParams)


class Cost(Frozen):
    """What a step is expected to cost.

    Attributes:
        memory: peak resident bytes.
        disk: bytes written to the store.
        seconds: wall time; None when there is no basis for an estimate.
    """

    memory: int
    disk: int
    seconds: float | None = None


class Progress(Protocol):
    """Where a pass says how far it is. Safe to call often."""

    def start(self, task: str, total: int | None = None) -> None:
        """Begin a task of ``total`` units."""

    def update(self, done: int, **fields: float | str) -> None:
        """``done`` units of the current task are finished; ``fields`` are shown beside the bar."""

    def finish(self) -> None:
        """The current task is over."""

    def note(self, message: str) -> None:
        """Say one thing to the user."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among those that run the same pass together.

    Attributes:
        rank, size: its number, and how many there are.
        local_size: how many there are on this machine.
        strategy: ``ddp``: the whole model in each; ``fsdp``: a part of every weight in each.
        attempt: how often memory ran out in all of them together.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    strategy: str = "ddp"
    attempt: int = 0


@dataclass(slots=True)
class PassContext:
    """What a pass is given to work with.

    Attributes:
        out: an empty staging folder; everything written here becomes the artifact.
        machine: this machine.
        accelerator: the host's device and execution providers.
        target: the target's device and execution providers.
        data: name -> data config of the document.
        base_dir: folder that relative data paths are looked up in.
        progress: where to say how far it is.
        journal: checkpoints of this very step; survives a kill.
        series, facts: curves and JSON facts kept with the result.
        attributes: attributes of the artifact made.
        step: name of the step in the document.
        tracking: folder for experiment trackers, in the output folder; made when one is asked for.
        place: among the processes that run the pass together.
        statistics: of the model, which other steps may have computed or may go on from.
    """

    out: Path
    machine: Machine
    accelerator: Accelerator
    target: Accelerator
    data: Mapping[str, DataConfig]
    base_dir: Path
    progress: Progress
    journal: Journal
    series: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    step: str = "run"
    tracking: Path | None = None
    place: Place = Place()
    statistics: Statistics = field(default_factory=Statistics)


class Pass(ABC, Generic[P]):
    """A technique that turns one artifact into another.

    Subclasses set ``Params``, ``accepts``, ``produces``, ``libraries`` and override at most ``check``,
    ``estimate``, ``leaves`` and ``run``. The module of a pass imports heavy libraries only inside these
    functions.

    Attributes:
        Params: type of its parameters.
        accepts: kinds it takes.
        produces: kind it makes.
        extra: the pip extra that brings what it imports.
        libraries: distributions it imports; their versions are part of the cache key.
        gates: gates that hold what it makes, in order.
        hardware: what of the hardware its result depends on: ``device``, ``training_dtype``,
            ``execution_provider``; these are part of the cache key.
        pairs: whether it reads its data as pairs of a preferred and a rejected answer.
        strategies: how several processes may share the model while they run it together.
        makes_integers: whether the weights it makes are integers, which most passes cannot go on from.
        reads_integers: whether it goes on from them.
        needs_integers: whether it goes on from nothing else.
        keeps_kind: whether what it makes is of the kind that it was given; ``produces`` is then the first of
            ``accepts``.
    """

    Params: ClassVar[type[PassParams]]
    accepts: ClassVar[tuple[Kind, ...]]
    produces: ClassVar[Kind]
    extra: ClassVar[str] = "cpu"
    libraries: ClassVar[tuple[str, ...]] = ()
    gates: ClassVar[tuple[str, ...]] = ()
    hardware: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[bool] = False
    strategies: ClassVar[tuple[str, ...]] = ("ddp", "fsdp")
    makes_integers: ClassVar[bool] = False
    reads_integers: ClassVar[bool] = False
    needs_integers: ClassVar[bool] = False
    keeps_kind: ClassVar[bool] = False

    @classmethod
    def makes(cls, given: Kind) -> Kind:
        """The kind of what it makes from a model of the kind ``given``."""
        return given if cls.keeps_kind else cls.produces

    @classmethod
    def gates_of(cls, given: Kind) -> tuple[str, ...]:
        """Gates that hold what it makes from a model of the kind ``given``, in order."""
        return cls.gates

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Everything that would fail later, found without a heavy import.

        ``accelerator`` is the host's; the target's for a pass that declares ``execution_provider``.
        """
        return ()

    def check_integers(self, params: P) -> Iterable[Problem]:
        """What is wrong with this pass after one that makes integers; found without a heavy import."""
        yield Problem(
            f"{type(self).__name__} takes a model in floating point, and a pass before it makes integers",
            fix="Put the quantising pass after it.",
        )

    def check_settings(self, params: P, quantiser: PassParams) -> Iterable[Problem]:
        """What is wrong with integers as the pass before it, with parameters ``quantiser``, makes them."""
        return ()

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """Expected peak memory, disk and time; ``data`` counts the rows and tokens of each data config."""
        return Cost(memory=0, disk=0)

    def bits(
        self, model: ModelInfo, params: P, target: Accelerator, before: PlannedBits | None
    ) -> PlannedBits | None:
        """Which integers the layers will get, by tensor headers; None for a pass that makes none.

        ``before`` is what the step before this one chooses, where it has not run yet.
        """
        return None

    def leaves(self, model: ModelInfo, params: P) -> ModelInfo:
        """What a plan knows of the model after this pass: what the passes that follow are checked against."""
        return model

    def processes(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator, devices: Devices
    ) -> tuple[int, str]:
        """How many processes run it together, and by which strategy; one unless a pass knows how."""
        return 1, "ddp"

    @abstractmethod
    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Make the artifact in ``ctx.out``."""

    def ensure(self, out: Path, given: Kind | None = None) -> None:
        """Check what came out; the message is for the developer of the pass.

        Args:
            out: what the pass wrote.
            given: kind of the model that it was given.

        Raises:
            PassFailed: the folder does not hold a model of the kind the pass declares.
        """
        kind = self.produces if given is None else self.makes(given)
        for name in _REQUIRED[kind]:
            if not any(out.glob(name)):
                raise PassFailed(
                    f"{type(self).__name__} said it makes {kind.value}, but wrote no {name}",
                    fix="Pass developer: write the whole artifact into ctx.out.",
                )
        for path in out.rglob("*.json"):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise PassFailed(
                    f"{type(self).__name__} wrote {path.name} that is no JSON: {error}"
                ) from error
        for path in out.rglob("*.safetensors"):
            _ensure_finite(path, type(self).__name__)


def _ensure_finite(path: Path, name: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise PassFailed(
                        f"{name} wrote NaN or infinity in {key} of {path.name}",
                        fix="Lower the learning rate, or train in float32.",
                    )
    except SafetensorError as error:
        raise PassFailed(f"{name} wrote {path.name} that does not load: {error}") from error


_REQUIRED: dict[Kind, tuple[str, ...]] = {
    Kind.HF: ("config.json", "*.safetensors"),
    Kind.ADAPTER: ("adapter_config.json", "adapter_model.safetensors"),
    Kind.ONNX: ("*.onnx",),
    Kind.GENAI: ("genai_config.json", "*.onnx"),
    Kind.GGUF: ("*.gguf", "config.json"),
}
