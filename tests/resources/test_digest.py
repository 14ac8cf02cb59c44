"""Digests: by content, and never a remembered one for a file that changed (row 22 of the fault matrix)."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from olive.errors import ConfigError, UntrustedInput
from olive.resources import digest
from olive.resources.digest import file_digest, folder_digest
from olive.store.integrity import table_digest, tabulate


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were really read."""
    names: list[str] = []
    real = digest._hash

    def hashed(path: Path) -> str:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(digest, "_hash", hashed)
    return names


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as old enough to remember at once."""
    monkeypatch.setattr(digest, "_SETTLED", -1.0)


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc" * 100_000)
    assert file_digest(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_folder_has_the_digest_that_the_store_gives_it(tmp_path: Path) -> None:
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "b").write_bytes(b"2")
    (tmp_path / "sub.x").write_bytes(b"1")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "é").write_bytes(b"3")
    assert folder_digest(tmp_path) == table_digest(tabulate(tmp_path))


def test_every_change_of_a_folder_changes_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x").write_bytes(b"1")
    seen = {folder_digest(folder)}
    (folder / "a" / "x").write_bytes(b"2")
    seen.add(folder_digest(folder))
    (folder / "a" / "y").write_bytes(b"")
    seen.add(folder_digest(folder))
    (folder / "a" / "y").rename(folder / "a" / "z")
    seen.add(folder_digest(folder))
    (folder / "a").rename(folder / "b")
    seen.add(folder_digest(folder))
    assert len(seen) == 5


def test_links_count_by_content(tmp_path: Path) -> None:
    """The Hugging Face cache is made of links."""
    plain, linked = tmp_path / "plain", tmp_path / "linked"
    for folder in (plain, linked):
        folder.mkdir()
    (plain / "x").write_bytes(b"1")
    (linked / "x").symlink_to(plain / "x")
    assert folder_digest(linked) == folder_digest(plain)


def test_circles_broken_links_and_pipes_are_refused(tmp_path: Path) -> None:
    for number, make in enumerate(
        (
            lambda path: path.symlink_to(path.parent, target_is_directory=True),
            lambda path: path.symlink_to("nowhere"),
            os.mkfifo,
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "odd")
        with pytest.raises(UntrustedInput):
            folder_digest(folder)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        file_digest(tmp_path / "x")
    with pytest.raises(ConfigError):
        folder_digest(tmp_path / "x")


@pytest.mark.usefixtures("settled")
def test_an_untouched_file_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    memo = tmp_path / "cache" / "digests.json"
    path = tmp_path / "x"
    path.write_bytes(b"1")
    first = file_digest(path, memo)
    assert file_digest(path, memo) == first
    assert reads == ["x"]


@pytest.mark.usefixtures("settled")
def test_a_file_rewritten_under_the_same_size_and_time_is_read_again(
    tmp_path: Path, reads: list[str]
) -> None:
    memo, path = tmp_path / "digests.json", tmp_path / "x"
    path.write_bytes(b"1")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    before = file_digest(path, memo)
    path.write_bytes(b"2")
    os.utime(path, ns=times)
    assert path.stat().st_mtime_ns == times[1]
    assert file_digest(path, memo) != before
    assert reads == ["x", "x"]


@pytest.mark.usefixtures("settled")
def test_a_file_replaced_by_rename_is_read_again(tmp_path: Path) -> None:
    memo, path, other = tmp_path / "digests.json", tmp_path / "x", tmp_path / "y"
    path.write_bytes(b"1")
    other.write_bytes(b"2")
    before = file_digest(path, memo)
    other.rename(path)
    assert file_digest(path, memo) != before


def test_a_fresh_file_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    memo, path = tmp_path / "digests.json", tmp_path / "x"
    path.write_bytes(b"1")
    file_digest(path, memo)
    file_digest(path, memo)
    assert reads == ["x", "x"]
    assert not memo.exists()


def test_a_settled_file_is_remembered(tmp_path: Path, reads: list[str]) -> None:
    memo, path = tmp_path / "digests.json", tmp_path / "x"
    path.write_bytes(b"1")
    time.sleep(2.1)
    file_digest(path, memo)
    file_digest(path, memo)
    assert reads == ["x"]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 0, "files": {}}', '{"format": 1, "files": 3}', "\0"]
)
def test_a_damaged_memory_is_only_forgotten(tmp_path: Path, text: str, reads: list[str]) -> None:
    memo, path = tmp_path / "digests.json", tmp_path / "x"
    path.write_bytes(b"1")
    memo.write_text(text)
    file_digest(path, memo)
    file_digest(path, memo)
    assert reads == ["x"]
    assert json.loads(memo.read_text())["files"]


@pytest.mark.usefixtures("settled")
def test_a_memory_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "x"
    path.write_bytes(b"1")
    assert file_digest(path, tmp_path / "file" / "digests.json") == hashlib.sha256(b"1").hexdigest()


@pytest.mark.usefixtures("settled")
def test_the_memory_is_shared_by_folders_and_keeps_what_others_wrote(
    tmp_path: Path, reads: list[str]
) -> None:
    memo, folder = tmp_path / "digests.json", tmp_path / "f"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(name.encode())
    file_digest(folder / "a", memo)
    folder_digest(folder, memo)
    folder_digest(folder, memo)
    assert reads == ["a", "b"]
