"""Training killed at every file operation of a checkpoint goes on to the same curve, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
import itertools

from store_kit import arm, fork, run_killed, status
from test_lora_training import adapter, params, train

from olive.store.journal import Journal
from tiny import tiny_phi3
from training_kit import data, rows

STEPS = 6
SAVED = (2, 4, 6)  # nothing to fall back on; one to fall back on; the last step, and one to prune


@dataclass
class Killed:
    """What was left on disk by a training that died while it wrote a checkpoint."""

    step: int
    point: str
    folder: Path


class Recorder:
    """In place of ``Journal.commit``: dies at many moments, each in a copy of the process, then commits."""

    def __init__(self, root: Path, stride: int) -> None:
        self.root, self.stride, self.left = root, stride, list[Killed]()
        self.commit = Journal.commit

    def __call__(self, journal: Journal, step: int, write: Any, state: dict[str, Any]) -> None:
        def copied(name: str) -> Journal:
            folder = self.root / f"{step}-{name}" / "journal"
            if journal.path.exists():
                shutil.copytree(journal.path, folder)
            return Journal(folder)

        counted = copied("counted")
        points, renames = _operations(lambda: self.commit(counted, step, write, state))
        assert points > 60
        assert renames
        # what the collector closes and when makes a few operations more or less
        last = points - 5
        around = {point + side for point in renames for side in (-1, 0, 1, 2)}
        for point in sorted({1, last, *around, *range(1 + last % self.stride, last, self.stride)}):
            own = copied(str(point))
            died = run_killed(lambda own=own: self.commit(own, step, write, state), point)
            assert died == -signal.SIGKILL
            self.left.append(Killed(step, f"operation {point} of {points}", own.path))
        for size in _middles(counted.path / f"ckpt-{step}" / "files"):
            own = copied(f"byte-{size}")
            died = status(
                fork(lambda own=own, size=size: _cut_off(self.commit, own, step, write, state, size))
            )
            assert died == -signal.SIGXFSZ, "nothing was written beyond that byte"
            self.left.append(Killed(step, f"byte {size} of a file", own.path))
        self.commit(journal, step, write, state)


def _operations(job: Callable[[], Any]) -> tuple[int, list[int]]:
    """How many file operations ``job`` does, and which of them are renames."""
    reader, writer = os.pipe()

    def counted() -> None:
        count, renames = arm(None), list[int]()
        sys.addaudithook(lambda event, _: renames.append(count[0]) if event == "os.rename" else None)
        job()
        sys.setprofile(None)
        os.write(writer, json.dumps([count[0], renames]).encode())

    assert status(fork(counted)) == 0
    os.close(writer)
    with os.fdopen(reader) as file:
        points, renames = json.loads(file.read())
        return points, renames


def _middles(files: Path) -> list[int]:
    """Sizes that end a write in the middle of one file of the checkpoint, and of no smaller one."""
    sizes = sorted({0, *(path.stat().st_size for path in files.iterdir())})
    return [(small + large) // 2 for small, large in itertools.pairwise(sizes)]


def _cut_off(commit: Any, journal: Journal, step: int, write: Any, state: Any, size: int) -> None:
    """The kernel ends the process in the middle of the write that would make a file larger than ``size``."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    commit(journal, step, write, state)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: each kill waits for its fsyncs."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"lora_dropout": 0.2},
    "best": {
        "lora_dropout": 0.2,
        "eval_dataset_size": 4,
        "training_args": {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "load_best_model_at_end": True,
            # high enough that the best adapter is not the last one
            "learning_rate": 0.6,
        },
    },
}


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_a_kill_at_any_moment_of_a_checkpoint_changes_nothing(
    memory: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stride: int
) -> None:
    base, config = tiny_phi3(memory / "base"), data(rows(memory))
    given = SETTINGS[kind]
    schedule = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}
    wanted = params(**given | {"training_args": schedule | given.get("training_args", {})})
    calm = train(base, memory / "calm", config, wanted)
    curve, weights = _curve(calm), adapter(calm)
    if kind == "best":
        evaluated = [point["eval_loss"] for point in calm.series["loss"]]
        assert min(evaluated) < evaluated[-1], "the best adapter should not be the last one"

    recorder = Recorder(memory / "killed", stride)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", lambda *given: recorder(*given))
        watched = train(base, memory / "watched", config, wanted)
    assert _curve(watched) == curve
    assert {killed.step for killed in recorder.left} == set(SAVED)

    went_on = {step: set[int]() for step in SAVED}
    for killed in recorder.left:
        newest = Journal(killed.folder).newest()
        went_on[killed.step].add(newest.step if newest else 0)
        resumed = train(base, killed.folder.parent, config, wanted)
        where = f"step {killed.step}, {killed.point}"
        assert resumed.journal.findings == [], f"a kill must never look like damage: {where}"
        assert _curve(resumed) == curve, where
        found = adapter(resumed)
        assert all(bool((tensor == found[name]).all()) for name, tensor in weights.items()), where
    # before the rename the one before counts, after it the new one
    assert went_on == {step: {step - 2, step} for step in SAVED}


def _curve(ctx: Any) -> list[dict[str, float]]:
    """What the curve says of each step, but for how fast it was."""
    return [
        {name: value for name, value in point.items() if name != "tokens_per_second"}
        for point in ctx.series["loss"]
    ]
