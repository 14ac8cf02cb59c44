"""Rows 7 to 10 of the fault matrix: a full disk, a file-size limit."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_kit import FILES, INPUTS, KEY, compute, contents, delivered, fork, produce, status

from olive.errors import EnvironmentFault
from olive.store.store import Store

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(b"f" * size)
            except OSError:
                pass


def assert_told(fault: EnvironmentFault, path: Path) -> None:
    text = str(fault)
    assert fault.exit_code == 5
    assert str(path) in text
    assert "disk is full" in text
    assert "needs" in text
    assert "bytes), free" in text
    assert "fix:" in text


def test_disk_full_while_staging(small: Path) -> None:
    other = compute(small, files={"a": b"x" * 1000})
    key = "1" * 64
    store = Store(small)
    with pytest.raises(EnvironmentFault) as caught, store.stage() as staging:
        produce(staging.path, {"big": b"x" * (6 * MIB)})
    assert_told(caught.value, small)
    assert not list((small / "staging").iterdir())
    assert store.lookup(key) is None
    assert Store(small).lookup(KEY) is not None
    assert contents(other.path) == {"a": b"x" * 1000}
    assert contents(compute(small, key=key).path) == FILES


def test_disk_full_in_a_native_writer(small: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    with pytest.raises(EnvironmentFault) as caught, Store(small).stage() as staging:
        save_file({"w": numpy.zeros(6 * MIB, numpy.uint8)}, staging.path / "model.safetensors")
    assert_told(caught.value, small)


def test_space_is_asked_for_before_work_starts(small: Path) -> None:
    reached = False
    with pytest.raises(EnvironmentFault) as caught, Store(small).stage(needed=10**10):
        reached = True
    assert not reached
    assert_told(caught.value, small)
    assert "10.0 GB (10000000000 bytes)" in str(caught.value)
    assert not list((small / "staging").iterdir())


def test_disk_full_writing_the_manifest(small: Path) -> None:
    store = Store(small)

    def on_a_disk_that_fills() -> None:
        with store.stage() as staging:
            produce(staging.path)
            fill(small)
            store.publish(staging, KEY, {"log": "x" * 10_000}, INPUTS)

    with pytest.raises(EnvironmentFault) as caught:
        on_a_disk_that_fills()
    assert_told(caught.value, small)
    (small / "filler").unlink()
    assert Store(small).lookup(KEY) is None
    assert not list((small / "entries").glob("*"))
    assert not list(small.rglob("manifest.json"))
    compute(small)


def test_disk_full_writing_a_checkpoint(small: Path) -> None:
    journal = Store(small).journal(KEY)
    journal.commit(1, lambda folder: produce(folder), {"n": 1})
    with pytest.raises(EnvironmentFault) as caught:
        journal.commit(2, lambda folder: produce(folder, {"big": b"x" * (6 * MIB)}), {"n": 2})
    assert_told(caught.value, small)
    newest = journal.newest()
    assert newest is not None
    assert (newest.step, newest.state) == (1, {"n": 1})
    assert [path.name for path in journal.path.iterdir()] == ["ckpt-1"]


def test_disk_full_at_delivery(tmp_path: Path, small: Path) -> None:
    store = Store(tmp_path / "store")
    old = compute(tmp_path / "store", files={"a": b"old"})
    key = "1" * 64
    new = compute(tmp_path / "store", key=key, files={"a": b"x" * MIB, "b": b"y" * (5 * MIB)})
    store.materialise(old, small / "model")
    with pytest.raises(EnvironmentFault) as caught:
        store.materialise(new, small / "model")
    assert_told(caught.value, small / "model")
    assert str(new.size) in str(caught.value)
    assert delivered(small / "model") == {"a": b"old"}
    assert [path.name for path in small.iterdir()] == ["model"]
    assert Store(tmp_path / "store").lookup(key) is not None


def test_file_size_limit_leaves_no_sticky_failure(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(EnvironmentFault, match=r"file-size limit[^$]*ulimit -f"):
            compute(tmp_path)

    assert status(fork(limited)) == 0
    assert not list((tmp_path / "staging").iterdir())
    assert Store(tmp_path).lookup(KEY) is None
    assert contents(compute(tmp_path).path) == FILES


def test_file_size_limit_at_delivery(tmp_path: Path) -> None:
    entry = compute(tmp_path / "store")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(EnvironmentFault, match="file-size limit"):
            Store(tmp_path / "store").materialise(entry, tmp_path / "out" / "model")

    assert status(fork(limited)) == 0
    assert not list((tmp_path / "out").iterdir())
    Store(tmp_path / "store").materialise(entry, tmp_path / "out" / "model")
    assert delivered(tmp_path / "out" / "model") == FILES


def test_a_read_only_store_says_so(small: Path) -> None:
    compute(small)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with pytest.raises(EnvironmentFault, match="read-only"):
        Store(small).lookup(KEY)
    with pytest.raises(EnvironmentFault, match="read-only"), Store(small).stage():
        pass
