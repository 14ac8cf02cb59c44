"""What a stored entry tells, and which entries gc keeps."""

from __future__ import annotations

import os
from pathlib import Path

from store_kit import FILES, INPUTS, KEY, compute

from olive.store.integrity import table_digest, tabulate
from olive.store.keys import key
from olive.store.store import Store

SIZE = sum(map(len, FILES.values()))


def test_an_entry_tells_what_it_is(tmp_path: Path) -> None:
    made = compute(tmp_path)
    found = Store(tmp_path).lookup(KEY)
    assert found is not None
    for entry in (made, found, *Store(tmp_path).entries()):
        assert (entry.key, entry.size, entry.meta, entry.inputs) == (KEY, SIZE, {"seconds": 1.5}, INPUTS)
        assert entry.digest == table_digest(tabulate(entry.path))
        assert entry.path.is_relative_to(tmp_path / "entries")


def test_the_digest_is_of_the_files_alone(tmp_path: Path) -> None:
    assert compute(tmp_path).digest == compute(tmp_path, key="1" * 64).digest
    other = {**FILES, "sub/tokenizer.json": b"[]"}
    assert compute(tmp_path, key="2" * 64, files=other).digest != compute(tmp_path).digest
    renamed = {"sub/tokenizer2.json" if name.startswith("sub") else name: FILES[name] for name in FILES}
    assert compute(tmp_path, key="3" * 64, files=renamed).digest != compute(tmp_path).digest


def test_a_lookup_in_no_store_makes_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.lookup(KEY) is None
    assert list(store.entries()) == []
    assert store.verify() == []
    assert store.nearest({}) is None
    assert not (tmp_path / "none" / "entries").exists()


def test_curves_with_nan_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.stage() as staging:
        (staging.path / "a").write_bytes(b"a")
        store.publish(staging, KEY, {"loss": [1.0, float("nan")]}, {})
    found = Store(tmp_path).lookup(KEY)
    assert found is not None
    assert str(found.meta["loss"]) == "[1.0, nan]"


def fill(root: Path) -> list[str]:
    keys = [key({"n": number}) for number in range(4)]
    for age, one in enumerate(reversed(keys)):
        compute(root, key=one)
        path = root / "entries" / one / "manifest.json"
        when = path.stat().st_mtime - 1000 * (len(keys) - age)
        os.utime(path, (when, when))
    return keys


def test_gc_by_size_removes_the_least_recently_used(tmp_path: Path) -> None:
    keys = fill(tmp_path)
    looked = Store(tmp_path)
    looked.lookup(keys[3])
    looked.close()
    Store(tmp_path).gc(max_bytes=2 * SIZE)
    assert {entry.key for entry in Store(tmp_path).entries()} == {keys[3], keys[0]}


def test_gc_by_age(tmp_path: Path) -> None:
    keys = fill(tmp_path)
    assert Store(tmp_path).gc(older_than=2500) > 2 * SIZE
    assert {entry.key for entry in Store(tmp_path).entries()} == set(keys[:2])


def test_gc_spares_what_this_process_uses(tmp_path: Path) -> None:
    keys = fill(tmp_path)
    store = Store(tmp_path)
    store.lookup(keys[2])
    store.gc(max_bytes=0)
    assert [entry.key for entry in store.entries()] == [keys[2]]
    store.close()
    store.gc(max_bytes=0)
    assert list(store.entries()) == []


def test_gc_without_limits_keeps_every_entry(tmp_path: Path) -> None:
    fill(tmp_path)
    assert Store(tmp_path).gc() == 0
    assert len(list(Store(tmp_path).entries())) == 4


def test_gc_keeps_the_journal_of_a_step_in_progress(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.journal(KEY).commit(1, lambda folder: (folder / "w").touch(), {})
    assert store.gc() == 0
    assert store.journal(KEY).newest()
    compute(tmp_path)
    with store.claim(KEY):
        store.gc()
        assert store.journal(KEY).newest()
    assert "finished" in store.verify()[0].message
    assert store.gc() > 0
    assert store.journal(KEY).newest() is None


def test_nearest_explains_a_miss(tmp_path: Path) -> None:
    compute(tmp_path)
    store = Store(tmp_path)
    with store.stage() as staging:
        (staging.path / "a").write_bytes(b"a")
        store.publish(staging, "1" * 64, {}, {"pass": "Another", "params": {"x": 1}})
    found = store.nearest({**INPUTS, "params": {"r": 16}})
    assert found is not None
    assert found[0].key == KEY
    assert [str(item) for item in found[1]] == ["params.r: 8 -> 16"]
