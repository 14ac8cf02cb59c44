"""Kills, signals, full disks, two runs at once: what was finished stays, and the result is the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from fault_kit import (
    CHECKPOINT,
    Done,
    Fault,
    Started,
    cached,
    cold,
    copy,
    digests,
    document,
    ended,
    leases,
    model,
    names,
    result,
    run,
    store,
    until,
    warm,
    write,
    write_rows,
)

from tiny import tiny_phi3

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks")
RUN = ("run", "doc.json")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which nothing has run."""
    folder = tmp_path_factory.mktemp("fresh")
    tiny_phi3(folder / "base")
    write_rows(folder)
    write(folder, document())
    return folder


@pytest.fixture(scope="module")
def calm(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the document ran undisturbed."""
    folder = copy(fresh, tmp_path_factory.mktemp("calm") / "work")
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert cached(folder) == []
    assert leases(folder) == store(folder, "staging") == store(folder, "work") == []
    return folder


@pytest.fixture
def merged(calm: Path, tmp_path: Path) -> Path:
    """A workspace in which only the export has not run."""
    folder = copy(calm, tmp_path / "merged")
    steps = {step["name"]: step["key"] for step in result(calm)["steps"]}
    shutil.rmtree(folder / ".olive-cache" / "entries" / steps["export"])
    return folder


def steps(folder: Path) -> list[tuple[str, str, str]]:
    """Name, key and content of every step of the last run."""
    return [(step["name"], step["key"], step["digest"]) for step in result(folder)["steps"]]


def killed(folder: Path, at: str, after: int = 0) -> Done:
    done = run(*RUN, cwd=folder, fault=Fault(at=at, after=after))
    assert done.code == -signal.SIGKILL, done.said
    return done


def test_a_second_run_does_no_work(calm: Path) -> None:
    entries, delivered, before = digests(calm / ".olive-cache" / "entries"), model(calm), result(calm)
    times = {path: path.stat().st_mtime_ns for path in (calm / "olive-output" / "model").iterdir()}
    done = ended(cold(*RUN, cwd=calm))
    assert done.code == 0, done.said
    assert "every step is in the cache" in done.err
    assert cached(calm) == ["lora", "merge", "export"]
    assert digests(calm / ".olive-cache" / "entries") == entries
    assert model(calm) == delivered
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert leases(calm) == store(calm, "staging") == store(calm, "work") == []
    for step, earlier in zip(result(calm)["steps"], before["steps"], strict=True):
        assert step | {"cached": False} == earlier


def test_killed_in_every_phase(calm: Path, fresh: Path, tmp_path: Path) -> None:
    """One workspace, killed again and again; each run goes on from where the one before it was."""
    folder = copy(fresh, tmp_path / "work")
    killed(folder, r"/work/[0-9a-f]{64}/ckpt-6\.tmp")  # before the third checkpoint is whole
    assert store(folder, "entries") == []

    done = killed(folder, r"staging-\w+/files/README|adapter_config\.json$")  # while the adapter is written
    assert f"{CHECKPOINT} 4" in done.err
    assert store(folder, "entries") == []

    done = killed(folder, r"/entries/[0-9a-f]{64}$")  # right before the adapter is published
    assert f"{CHECKPOINT} 12" in done.err
    assert store(folder, "entries") == []

    done = killed(folder, r"staging-\w+/files/model\.safetensors")  # during the merge
    assert len(store(folder, "entries")) == 1

    done = killed(folder, r"staging-\w+/files/.*\.onnx")  # during the export
    assert "to run: merge" in done.err
    assert "training" not in done.err
    assert len(store(folder, "entries")) == 2

    done = killed(folder, r"\.model\.olive-\w+\.tmp/model\.onnx\.data")  # during the delivery
    assert "to run: export" in done.err
    assert "merge" not in done.err
    assert len(store(folder, "entries")) == 3
    assert not (folder / "olive-output" / "model").exists()

    killed(folder, r"olive-report-run\.json")  # after it
    assert model(folder) == model(calm)
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert "every step is in the cache" in done.err
    assert names(folder / "olive-output") == ["README.md", "model", "report.html", "run.json"]
    assert model(folder) == model(calm)
    assert steps(folder) == steps(calm)
    assert result(folder)["steps"][0]["facts"]["steps"] == 12
    losses, calm_losses = (
        [point["loss"] for point in result(each)["steps"][0]["series"]["loss"]] for each in (folder, calm)
    )
    assert losses == calm_losses
    assert store(folder, "staging") == []
    freed = run("cache", "gc", cwd=folder)
    assert freed.code == 0
    assert leases(folder) == store(folder, "work") == store(folder, "quarantine") == []


def test_killed_between_two_passes(calm: Path, fresh: Path, tmp_path: Path) -> None:
    folder = copy(fresh, tmp_path / "work")
    write(folder, document(passes=["lora", "merge"]))
    done = killed(folder, r"/claim-[0-9a-f]{64}\.lock$", after=1)  # before the second step is begun
    assert "training ..." in done.err
    assert len(store(folder, "entries")) == 1
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert "training" not in done.err
    assert cached(folder) == ["lora"]
    assert steps(folder) == steps(calm)[:2]


def check_stopped(folder: Path, done: Done, code: int) -> None:
    assert done.code == code, done.said
    assert "Traceback" not in done.err
    assert "checkpoints are kept in .olive-cache; the same command continues from there" in done.err
    assert store(folder, "staging") == leases(folder) == []
    assert not (folder / "olive-output").exists()


def test_terminated_while_training(fresh: Path, tmp_path: Path) -> None:
    """The program as a user starts it, stopped from outside once a checkpoint is there."""
    folder = copy(fresh, tmp_path / "work")
    write(folder, document(steps=60, passes=["lora"]))
    victim = cold(*RUN, cwd=folder)
    until(
        lambda: list(folder.glob(".olive-cache/work/*/ckpt-2")),
        "a checkpoint",
        lambda: victim.poll() is None,
    )
    victim.send_signal(signal.SIGTERM)
    check_stopped(folder, ended(victim), 143)
    assert store(folder, "entries") == []
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert CHECKPOINT in done.err
    assert result(folder)["steps"][0]["facts"]["steps"] == 60


def test_interrupted_while_training(calm: Path, fresh: Path, tmp_path: Path) -> None:
    folder = copy(fresh, tmp_path / "work")
    write(folder, document(passes=["lora"]))
    stop = Fault(at=r"/work/[0-9a-f]{64}/ckpt-8\.tmp", number=signal.SIGINT)
    check_stopped(folder, run(*RUN, cwd=folder, fault=stop), 130)
    assert store(folder, "entries") == []
    (journal,) = (folder / ".olive-cache" / "work").iterdir()
    # the checkpoint it came in is finished, and the step after it has its own
    assert names(journal) == ["ckpt-8", "ckpt-9"]
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert f"{CHECKPOINT} 9" in done.err
    assert steps(folder) == steps(calm)[:1]


def test_stopped_while_exporting(calm: Path, merged: Path, tmp_path: Path) -> None:
    """The child of a gate is killed, then the run is stopped beside that child, then during the export."""
    folder = merged
    kept = store(folder, "entries")
    slow = "import sys, time\nif any('generate_once' in one for one in sys.orig_argv):\n    time.sleep(100)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    fault = Fault(environment=(("PYTHONPATH", str(tmp_path)),))

    def gate() -> tuple[Started, psutil.Process]:
        def found() -> list[psutil.Process]:
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(victim.process.pid).children()
                return [one for one in children if "generate_once" in " ".join(one.cmdline())]
            return []

        victim = warm(*RUN, cwd=folder, fault=fault)
        return victim, until(found, "the gate's child", victim.process.is_alive)[0]

    victim, child = gate()
    child.kill()
    done = victim.wait()
    assert done.code == 3, done.said
    assert "signal 9" in done.err
    assert "bundle gate" in done.err
    assert store(folder, "entries") == kept
    assert store(folder, "staging") == leases(folder) == []

    victim, child = gate()
    os.kill(victim.process.pid, signal.SIGTERM)
    check_stopped(folder, victim.wait(), 143)
    assert not child.is_running()
    assert store(folder, "entries") == kept

    stop = Fault(at=r"staging-\w+/files/.*\.onnx", number=signal.SIGINT)
    check_stopped(folder, run(*RUN, cwd=folder, fault=stop), 130)
    assert store(folder, "entries") == kept

    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert cached(folder) == ["lora", "merge"]
    assert model(folder) == model(calm)


def test_a_changed_document_or_data_never_goes_on_from_a_checkpoint(
    calm: Path, fresh: Path, tmp_path: Path
) -> None:
    folder = copy(fresh, tmp_path / "work")
    body = document(passes=["lora"])
    write(folder, body)
    killed(folder, r"ckpt-8\.tmp")

    changed = document(passes=["lora"])
    changed["passes"]["lora"]["alpha"] = 8
    write(folder, changed)
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert CHECKPOINT not in done.err

    write(folder, body)
    write_rows(folder, tone="sad")
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert CHECKPOINT not in done.err

    write_rows(folder)
    (damaged,) = folder.glob(".olive-cache/work/*/ckpt-6/files/adapter.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert f"{CHECKPOINT} 4" in done.err
    assert "checkpoint 6 is damaged" in done.err.split("training", 1)[1].replace("\n ", "")
    assert any("checkpoint 6 is damaged" in found["message"] for found in result(folder)["findings"])
    assert steps(folder) == steps(calm)[:1]


def test_two_runs_at_once(calm: Path, fresh: Path, tmp_path: Path) -> None:
    folder = copy(fresh, tmp_path / "work")
    write(folder, document(passes=["lora", "merge"]))
    both = [warm(*RUN, cwd=folder), warm(*RUN, cwd=folder)]
    done = [each.wait() for each in both]
    assert [each.code for each in done] == [0, 0], done
    assert sum("training ..." in each.err for each in done) == 1
    assert sum("merge ..." in each.err for each in done) == 1
    assert len(store(folder, "entries")) == 2
    assert steps(folder) == steps(calm)[:2]
    assert store(folder, "staging") == store(folder, "work") == leases(folder) == []


def test_a_failure_is_not_kept(calm: Path, merged: Path) -> None:
    """A file-size limit stops the export; without it the next run succeeds."""
    kept = store(merged, "entries")
    done = run(*RUN, cwd=merged, fault=Fault(file_size=200_000))
    assert done.code == 5, done.said
    assert "file-size limit" in done.err
    assert "kept in .olive-cache" in done.err
    assert store(merged, "entries") == kept
    assert store(merged, "staging") == []
    assert not (merged / "olive-output").exists()
    done = run(*RUN, cwd=merged)
    assert done.code == 0, done.said
    assert cached(merged) == ["lora", "merge"]
    assert model(merged) == model(calm)


def test_no_room_for_the_delivery(calm: Path, tmp_path: Path) -> None:
    """What was delivered before stays as it was, reports included."""
    folder = copy(calm, tmp_path / "work", output=True)
    before, entries = digests(folder / "olive-output"), store(folder, "entries")
    write(folder, document(passes=["lora", "merge"]))
    done = run(*RUN, cwd=folder, fault=Fault(file_size=200_000))
    assert done.code == 5, done.said
    assert "delivering the result" in done.err
    assert digests(folder / "olive-output") == before
    assert names(folder / "olive-output") == ["README.md", "model", "report.html", "run.json"]
    assert store(folder, "entries") == entries
    done = run(*RUN, cwd=folder)
    assert done.code == 0, done.said
    assert (folder / "olive-output" / "model" / "model.safetensors").is_file()


def test_a_full_disk_at_the_delivery(calm: Path, tmp_path: Path) -> None:
    folder = copy(calm, tmp_path / "work")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        there = (*RUN, "-o", str(disk / "out"))
        done = run(*there, cwd=folder)
        assert done.code == 0, done.said
        before = digests(disk)
        write(folder, document(passes=["lora", "merge"]))
        done = run(*there, cwd=folder)
        assert done.code == 5, done.said
        assert "the disk is full" in done.err.replace("\n ", "")
        assert digests(disk) == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
