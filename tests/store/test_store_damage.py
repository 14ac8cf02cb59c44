"""Rows 11 to 16 of the fault matrix: damage is a miss, unreadable is no damage."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_kit import FILES, INPUTS, KEY, compute, contents, fork, status

from olive.errors import EnvironmentFault
from olive.store import integrity
from olive.store.keys import key
from olive.store.store import Store

FOLDER = Path("entries") / KEY
HOWS = ("truncate", "empty", "flip first", "flip middle", "flip last", "delete", "link")
CASES = [(name, how) for name in ("manifest.json", *(f"files/{name}" for name in FILES)) for how in HOWS]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncate":
        os.truncate(path, len(content) // 2)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "delete":
        path.unlink()
    elif how == "link":
        shutil.move(path, path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        place = {"flip first": 0, "flip middle": len(content) // 2, "flip last": -1}[how]
        content[place] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_damage_is_a_miss_and_is_made_again(tmp_path: Path, name: str, how: str) -> None:
    entry = compute(tmp_path)
    times = (entry.created, entry.created)
    damage(tmp_path / FOLDER / name, how)
    if how != "delete":
        os.utime(tmp_path / FOLDER / name, times)
    store = Store(tmp_path)
    assert store.lookup(KEY) is None
    assert len(store.findings) == 1
    assert "damaged" in store.findings[0].message
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
    again = compute(tmp_path)
    assert contents(again.path) == FILES
    assert again.digest == entry.digest


@pytest.mark.parametrize(
    "where", ["files/extra.bin", "files/sub/extra.bin", "extra.bin", "files/model.onnx.tmp"]
)
def test_an_added_file_is_damage(tmp_path: Path, where: str) -> None:
    compute(tmp_path)
    (tmp_path / FOLDER / where).write_bytes(b"x")
    assert Store(tmp_path).lookup(KEY) is None


def test_without_verify_sizes_and_names_still_count(tmp_path: Path) -> None:
    compute(tmp_path)
    damage(tmp_path / FOLDER / "files" / "model.onnx", "flip middle")
    assert Store(tmp_path).lookup(KEY, verify=False) is not None
    damage(tmp_path / FOLDER / "files" / "model.onnx", "truncate")
    assert Store(tmp_path).lookup(KEY, verify=False) is None


def test_an_edited_manifest_is_damage(tmp_path: Path) -> None:
    compute(tmp_path)
    path = tmp_path / FOLDER / "manifest.json"
    sealed = json.loads(path.read_text())
    sealed["body"]["meta"]["seconds"] = 0
    path.write_text(json.dumps(sealed))
    assert Store(tmp_path).lookup(KEY) is None


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"sha256": 1, "body": []}', "\x00" * 512, "{" * 5000])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, text: str) -> None:
    compute(tmp_path)
    (tmp_path / FOLDER / "manifest.json").write_text(text)
    assert Store(tmp_path).lookup(KEY) is None
    assert list(Store(tmp_path).entries()) == []


def test_an_entry_under_another_key_is_a_miss(tmp_path: Path) -> None:
    compute(tmp_path)
    other = key({**INPUTS, "pass": "Other"})
    shutil.copytree(tmp_path / FOLDER, tmp_path / "entries" / other)
    store = Store(tmp_path)
    assert store.lookup(other) is None
    assert "another key" in store.findings[0].message
    assert store.lookup(KEY) is not None


def test_verify_sets_damage_aside_and_names_it(tmp_path: Path) -> None:
    compute(tmp_path)
    good = key({"good": True})
    compute(tmp_path, key=good)
    damage(tmp_path / FOLDER / "files" / "model.onnx", "flip last")
    store = Store(tmp_path)
    found = [problem.message for problem in store.verify()]
    assert len(found) == 2
    assert "model.onnx has other content" in found[0]
    assert "set aside" in found[1]
    assert [entry.key for entry in store.entries()] == [good]
    assert store.gc() > 0
    assert store.verify() == []


def test_a_writer_replaces_a_damaged_winner(tmp_path: Path) -> None:
    """Between our lookup and our rename another process published, and its disk lied."""
    store = Store(tmp_path)
    with store.stage() as staging:
        (staging.path / "a").write_bytes(b"ours")
        compute(tmp_path)
        damage(tmp_path / FOLDER / "files" / "model.onnx", "flip last")
        entry = store.publish(staging, KEY, {}, {})
    assert contents(entry.path) == {"a": b"ours"}


def test_the_winner_of_a_race_is_the_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.stage() as staging:
        (staging.path / "a").write_bytes(b"ours")
        compute(tmp_path)
        entry = store.publish(staging, KEY, {}, {})
    assert contents(entry.path) == FILES
    assert not list((tmp_path / "staging").iterdir())


def test_too_many_open_files_keeps_the_entry(tmp_path: Path) -> None:
    compute(tmp_path)

    def starved(spare: int) -> None:
        limit = max(map(int, os.listdir("/proc/self/fd"))) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        store = Store(tmp_path)
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for descriptor in taken[:spare]:
            os.close(descriptor)
        try:
            hit = store.lookup(KEY) is not None
        except EnvironmentFault as fault:
            os._exit(5 if fault.exit_code == 5 and "too many open files" in str(fault) else 1)
        os._exit(0 if hit else 1)

    codes = [status(fork(lambda spare=spare: starved(spare))) for spare in range(6)]
    assert codes[0] == 5
    assert codes[-1] == 0
    assert set(codes) == {0, 5}
    assert Store(tmp_path).lookup(KEY) is not None
    assert not (tmp_path / "quarantine").exists()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A store that a user without privileges can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["manifest.json", "files/model.onnx", "files/sub", "files", "."])
def test_permission_denied_keeps_the_entry(shared: Path, name: str) -> None:
    compute(shared)
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    barred = shared / FOLDER / name
    mode = barred.stat().st_mode
    barred.chmod(0)

    def without_privilege() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with pytest.raises(EnvironmentFault, match="permission denied"):
            Store(shared).lookup(KEY)
        assert [problem.exit_code for problem in Store(shared).verify()] == [5]

    assert status(fork(without_privilege)) == 0
    barred.chmod(mode)
    assert Store(shared).lookup(KEY) is not None
    assert not list(shared.glob("quarantine/*"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_an_error_of_the_disk_keeps_the_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    compute(tmp_path)

    def broken(path: Path) -> str:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "file_digest", broken)
        with pytest.raises(EnvironmentFault, match=KEY):
            Store(tmp_path).lookup(KEY)
    assert Store(tmp_path).lookup(KEY) is not None
