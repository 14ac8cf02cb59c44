"""Run a job in several processes that work together, and watch over those of this machine.

Each is ``python -m olive.systems.worker job.json`` with torch's own variables for its place: what torchrun or
a scheduler sets as well. When one ends before its time the others are ended, and its error is raised.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from olive import errors
from olive.errors import EnvironmentFault, OliveError, OutOfMemory, PassFailed, Problem, Severity
from olive.hardware import signals
from olive.passes.base import Progress
from olive.systems.job import Job, JobResult

_ATTEMPTS = 4
_GRACE = 20.0  # seconds that a process is given to end by itself
_TAIL = 2000  # characters of a process's output that an error quotes


def run_together(job: Job, progress: Progress) -> JobResult | None:
    """Run ``job`` in as many processes as it asks for; of several hosts, this one's share of them.

    Where memory runs out in processes that cannot agree on less by themselves, all of them begin again from
    the last checkpoint with less in each forward pass.

    Returns:
        What the first process reports; None on the other hosts.

    Raises:
        OliveError: what the first process that failed raised.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _once(job, progress, attempt)
        except OutOfMemory as error:
            if attempt + 1 == _ATTEMPTS or job.hosts > 1:
                raise
            progress.note(f"{error.problems[0].message}; beginning again with less in each forward pass")
    raise AssertionError("not reached")


def _once(job: Job, progress: Progress, attempt: int) -> JobResult | None:
    with tempfile.TemporaryDirectory(prefix="olive-gang-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
        gang = [
            _start(job, folder, local, address, attempt)
            for address in (job.address or f"127.0.0.1:{_free_port()}",)
            for local in range(job.processes // job.hosts)
        ]
        stopped = [0]
        try:
            with _passing_signals_on(gang, stopped):
                _relay(gang[0].stdout, progress)
                _watch(gang, stopped)
        finally:
            # before the others are ended: they are not to blame
            failed = [rank for rank, process in enumerate(gang) if process.poll()]
            _end(gang)
        if stopped[0]:
            signals.end_by(stopped[0])
        if failed:
            raise _error(folder, gang, failed)
        if job.host:
            return None
        return JobResult.model_validate_json((folder / "result.json").read_bytes())


def _start(job: Job, folder: Path, local: int, address: str, attempt: int) -> subprocess.Popen[bytes]:
    from olive.hardware.probe import probe

    here = job.processes // job.hosts
    rank = job.host * here + local
    name, _, port = address.partition(":")
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(job.processes),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": name,
        "MASTER_PORT": port,
        "OLIVE_ATTEMPT": str(attempt),
        "OMP_NUM_THREADS": str(max(1, probe().cores // here)),
    }
    if job.hosts == 1:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with open(folder / f"log-{local}", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "olive.systems.worker", str(folder / "job.json")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if local == 0 else log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is passed on, once
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _relay(stream: IO[bytes] | None, progress: Progress) -> None:
    """Say what the first process says, from a thread of its own."""

    def read() -> None:
        for line in stream or ():
            try:
                said = json.loads(line)
                getattr(progress, said["call"])(*said["with"], **said.get("fields", {}))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    threading.Thread(target=read, daemon=True).start()


def _watch(gang: list[subprocess.Popen[bytes]], stopped: list[int]) -> None:
    """Until all have ended, or one has ended badly, or a signal's time is over."""
    while any(process.poll() is None for process in gang):
        if any(process.returncode for process in gang) and not stopped[0]:
            return
        time.sleep(0.05)


def _end(gang: list[subprocess.Popen[bytes]]) -> None:
    """End what still runs: the others wait for one that is gone."""
    for process in gang:
        if process.poll() is None:
            process.kill()
    for process in gang:
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@contextmanager
def _passing_signals_on(gang: list[subprocess.Popen[bytes]], stopped: list[int]) -> Iterator[None]:
    """Let the processes end with a checkpoint on Ctrl-C and SIGTERM; the second time ends them at once."""

    def pass_on(number: int, frame: Any) -> None:
        again, stopped[0] = bool(stopped[0]), number
        for process in gang:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if again else number)

    with signals.caught(pass_on):
        yield


def _error(folder: Path, gang: list[subprocess.Popen[bytes]], failed: list[int]) -> OliveError:
    """What went wrong: a signal, the first error that a process wrote down, or the end of what it said."""
    killed = [rank for rank in failed if gang[rank].returncode < 0]
    if killed:
        return EnvironmentFault(
            f"process {killed[0]} of {len(gang)} was ended by signal {-gang[killed[0]].returncode}",
            fix="The system may have been short of memory. Run again: it goes on from the last checkpoint.",
        )
    told = list(folder.glob("error-*.json"))
    if told:
        said = json.loads(min(told, key=lambda path: path.stat().st_mtime_ns).read_text(encoding="utf-8"))
        problems = [
            Problem(p["message"], p["where"], p["fix"], Severity(p["severity"]), p["exit_code"])
            for p in said["problems"]
        ]
        kind = getattr(errors, said["kind"], PassFailed)
        return kind(problems=problems)
    log = (folder / f"log-{failed[0]}").read_text(encoding="utf-8", errors="replace")[-_TAIL:].strip()
    code = gang[failed[0]].returncode
    return PassFailed(
        f"process {failed[0]} of {len(gang)} ended with code {code}: {log or 'it said nothing'}"
    )
