"""Training in two processes with gloo: the same loss curve and adapter as in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.config.workflow import Accelerator
from olive.errors import ConfigError
from olive.models.artifact import Artifact, Kind
from olive.systems.job import Job, JobResult
from olive.systems.local import execute
from tiny import tiny_llama
from training_kit import Notes, data, rows

# float32 sums in another order; Adam divides by the root of squares that are tiny in the first steps
LOSS, WEIGHT = 2e-6, 2e-5


def job(folder: Path, base: Path, name: str, processes: int, strategy: str = "ddp", **changes: Any) -> Job:
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 5e-3,
        "seed": 0,
    } | changes.pop("training_args", {})
    config = changes.pop("data", None) or data(rows(folder))
    params = {
        "r": 4,
        "alpha": 8,
        "lora_dropout": 0.0,
        "train_data_config": "train",
        "torch_dtype": "float32",
        "eval_dataset_size": 5,
        "training_args": arguments,
    }
    out = folder / name
    out.mkdir()
    return Job(
        step="tune",
        type=changes.pop("type", "LoRA"),
        params={name: value for name, value in (params | changes).items() if value is not None},
        model=Artifact(kind=Kind.HF, path=base, digest="0" * 64),
        data={"train": config},
        base_dir=folder,
        accelerator=Accelerator(),
        target=Accelerator(),
        out=out,
        journal=folder / f"{name}-journal",
        processes=processes,
        strategy=strategy,
    )


def trained(one: Job) -> tuple[JobResult, dict[str, Any]]:
    from safetensors.torch import load_file

    result, _ = execute(one, Notes())
    (weights,) = one.out.glob("*model.safetensors")
    return result, load_file(weights)


def apart(left: dict[str, Any], right: dict[str, Any]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("together")
    return folder, tiny_llama(folder / "base")


@pytest.mark.parametrize(
    ("name", "strategy", "changes"),
    [
        ("LoRA", "ddp", {}),
        ("LoRA", "fsdp", {}),
        ("QLoRA", "fsdp", {"quant_type": "nf4", "double_quant": True}),
        ("FullFinetune", "fsdp", {"r": None, "alpha": None, "lora_dropout": None}),
    ],
)
def test_two_processes_train_what_one_does(
    place: tuple[Path, Path], tmp_path: Path, name: str, strategy: str, changes: dict[str, Any]
) -> None:
    _, base = place
    arguments = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    arguments |= {"load_best_model_at_end": True}
    if name == "FullFinetune":
        arguments |= {"learning_rate": 1e-3, "bf16": False}
    alone, weights = trained(job(tmp_path, base, "alone", 1, type=name, training_args=arguments, **changes))
    both, others = trained(
        job(tmp_path, base, "both", 2, strategy, type=name, training_args=arguments, **changes)
    )
    assert both.facts["micro_batch"]["processes"] == 2
    for curve in ("loss", "eval_loss"):
        ones, twos = ([p[curve] for p in r.series["loss"] if curve in p] for r in (alone, both))
        assert twos == pytest.approx(ones, abs=LOSS)
        assert len(ones) >= 2
    assert alone.facts["tokens"] == both.facts["tokens"]
    assert apart(weights, others) < WEIGHT


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_in_another_number_of_processes(
    place: tuple[Path, Path], tmp_path: Path, strategy: str
) -> None:
    _, base = place
    whole, _ = trained(job(tmp_path, base, "whole", 1))
    first = job(tmp_path, base, "first", 2, strategy, training_args={"save_steps": 2})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", _RUN, first.model_dump_json()], env=environment) as process:
        while not list(first.journal.glob("ckpt-2")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    again = job(tmp_path, base, "again", 1, training_args={"save_steps": 2})
    notes = Notes()
    result, _ = execute(again.model_copy(update={"journal": first.journal}), notes)
    assert any("going on from the checkpoint" in note for note in notes.notes)
    assert [p["loss"] for p in result.series["loss"]] == pytest.approx(
        [p["loss"] for p in whole.series["loss"]], abs=LOSS
    )


def test_more_processes_than_rows_and_rows_of_unlike_length(place: tuple[Path, Path], tmp_path: Path) -> None:
    _, base = place
    arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 4}
    _, weights = trained(job(tmp_path, base, "alone", 1, training_args=arguments))
    for strategy in ("ddp", "fsdp"):
        _, others = trained(job(tmp_path, base, strategy, 2, strategy, training_args=arguments))
        assert apart(weights, others) < WEIGHT


def test_an_error_of_a_process_is_the_error_of_the_run(place: tuple[Path, Path], tmp_path: Path) -> None:
    _, base = place
    with pytest.raises(ConfigError, match="does not fit"):
        trained(job(tmp_path, base, "wrong", 2, target_modules=["nowhere"]))


def test_a_process_that_dies_is_named_and_the_others_are_ended(
    place: tuple[Path, Path], tmp_path: Path
) -> None:
    _, base = place
    one = job(tmp_path, base, "killed", 2, training_args={"max_steps": 100_000, "save_steps": 1})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", _RUN, one.model_dump_json()],
        env=environment,
        stderr=subprocess.PIPE,
    ) as process:
        while not list(one.journal.glob("ckpt-*")):
            assert process.poll() is None
            time.sleep(0.01)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert b"EnvironmentFault" in said
    assert b"process 1 of 2 was ended by signal 9" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_with_a_checkpoint(
    place: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    _, base = place
    one = job(tmp_path, base, "stopped", 2, training_args={"max_steps": 100_000, "save_strategy": "no"})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", _LOUD, one.model_dump_json()], env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # a step is done
        workers = children(process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == -number
    assert list(one.journal.glob("ckpt-*"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [int(child) for child in found]


_LOUD = """
import sys
from olive.systems.job import Job
from olive.systems.local import execute
from training_kit import Notes
class Loud(Notes):
    def update(self, done, **fields):
        if done:
            print(done, flush=True)
execute(Job.model_validate_json(sys.argv[1]), Loud())
"""
_RUN = """
import sys
from olive.systems.job import Job
from olive.systems.local import execute
from training_kit import Notes
execute(Job.model_validate_json(sys.argv[1]), Notes())
"""
