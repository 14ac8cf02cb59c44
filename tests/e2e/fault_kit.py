"""Runs that are hurt on purpose: a tiny document, children that start fast, and faults at chosen moments.

``cold`` starts the command line as a user does. ``warm`` forks it from a server that has already imported the
heavy libraries (and nothing of the product), so that a run costs what it does and not five seconds more.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "onnxruntime", "onnxruntime_genai.models.builder")
QUIET = {"NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
CHECKPOINT = "going on from the checkpoint of step"


@dataclass(frozen=True)
class Fault:
    """What befalls a warm run.

    Attributes:
        at: a signal to itself right before the file operation whose path matches this pattern.
        number: that signal.
        after: matches to let pass first.
        file_size: bytes no file may pass.
        path: folders on the import path before all others.
        environment: of the run and its children.
    """

    at: str | None = None
    number: int = signal.SIGKILL
    after: int = 0
    file_size: int | None = None
    path: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Done:
    """A run that ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


@dataclass
class Started:
    """A warm run under way."""

    process: Any
    log: Path

    def text(self) -> str:
        return "".join(path.read_text() for path in (self.log / "out", self.log / "err") if path.exists())

    def wait(self, timeout: float = 120) -> Done:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}")
        return Done(self.process.exitcode, *((self.log / name).read_text() for name in ("out", "err")))


def warm(*arguments: str, cwd: Path, fault: Fault | None = None) -> Started:
    """``olive ARGUMENTS`` in ``cwd``, forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(HEAVY))
    log = cwd / f".log-{time.monotonic_ns()}"
    log.mkdir()
    process = context.Process(target=_olive, args=(arguments, cwd, log, fault or Fault()))
    with pytest.MonkeyPatch.context() as patch:  # the server keeps the environment it starts in
        for name, value in QUIET.items():
            patch.setenv(name, value)
        process.start()
    return Started(process, log)


def run(*arguments: str, cwd: Path, fault: Fault | None = None) -> Done:
    """``warm``, to its end."""
    return warm(*arguments, cwd=cwd, fault=fault).wait()


def cold(*arguments: str, cwd: Path, path: Iterable[Path] = (), **more: str) -> subprocess.Popen[str]:
    """``python -m olive ARGUMENTS`` in ``cwd``."""
    paths = os.pathsep.join(map(str, path))
    return subprocess.Popen(
        [sys.executable, "-m", "olive", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET, **({"PYTHONPATH": paths} if paths else {}), **more},
    )


def ended(process: subprocess.Popen[str], timeout: float = 120) -> Done:
    out, err = process.communicate(timeout=timeout)
    return Done(process.returncode, out, err)


def until(true: Callable[[], Any], what: str, alive: Callable[[], bool], timeout: float = 90) -> Any:
    """The first value of ``true()`` that is true."""
    limit = time.monotonic() + timeout
    while not (found := true()):
        assert time.monotonic() < limit, f"{what} did not happen"
        assert alive(), f"the run ended before {what}"
        time.sleep(0.002)
    return found


def _olive(arguments: tuple[str, ...], cwd: Path, log: Path, fault: Fault) -> None:
    os.environ.update(QUIET | dict(fault.environment))
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY), number)
    sys.path[:0] = fault.path
    if fault.at is not None:
        _arm(fault)
    if fault.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, resource.RLIM_INFINITY))
    from olive.cli.main import entry

    sys.exit(entry(arguments))


def _arm(fault: Fault) -> None:
    pattern, left = re.compile(fault.at or ""), [fault.after]

    def audit(event: str, values: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event not in ("open", "os.rename"):
            return
        if any(isinstance(value, str | os.PathLike) and pattern.search(str(value)) for value in values[:2]):
            left[0] -= 1
            if left[0] == -1:
                os.kill(os.getpid(), fault.number)

    sys.addaudithook(audit)


def document(steps: int = 12, passes: Iterable[str] = ("lora", "merge", "export")) -> dict[str, Any]:
    """Train ``steps`` steps with a checkpoint every second one, merge, export."""
    known = {
        "lora": {
            "type": "LoRA",
            "r": 4,
            "target_modules": ["qkv_proj"],
            "train_data_config": "train",
            "training_args": {"max_steps": steps, "save_steps": 2},
        },
        "merge": {"type": "MergeAdapterWeights"},
        "export": {"type": "ModelBuilder", "precision": "fp32"},
    }
    return {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "rows.json", "split": "train"},
                "pre_process_data_config": {
                    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                    "strategy": "line-by-line",
                    "max_seq_len": 64,
                },
            }
        ],
        "passes": {name: known[name] for name in passes},
    }


def write(folder: Path, body: dict[str, Any], name: str = "doc.json") -> None:
    (folder / name).write_text(json.dumps(body, indent=1))


def write_rows(folder: Path, tone: str = "joy") -> None:
    rows = [{"phrase": f"phrase number {i:02}", "tone": tone} for i in range(24)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def model(folder: Path) -> dict[str, str]:
    """sha256 of every delivered file; the marker holds the time of the run."""
    found = digests(folder / "olive-output" / "model")
    found.pop(".olive-output.json")
    return found


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "olive-output" / "run.json").read_text())


def cached(folder: Path) -> list[str]:
    """Steps of the last run that came from the store."""
    return [step["name"] for step in result(folder)["steps"] if step["cached"]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def store(folder: Path, room: str) -> list[str]:
    """Names in a folder of the store."""
    return names(folder / ".olive-cache" / room)


def leases(folder: Path) -> list[str]:
    return [name for name in store(folder, "leases") if name.endswith(".lease")]


def copy(source: Path, target: Path, *, output: bool = False) -> Path:
    """A workspace like ``source``, with its store."""
    leave = shutil.ignore_patterns(".log-*", *([] if output else ["olive-output"]))
    shutil.copytree(source, target, symlinks=True, ignore=leave)
    return target
