"""Delivery: whole or not at all, and never over somebody's files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from store_kit import EVERY, FILES, KEY, compute, delivered, kill_points, run_killed

from olive.errors import ConfigError, PassFailed
from olive.store import materialise as module
from olive.store.store import Entry, Store

OLD = {"model.onnx": b"old", "old/only.txt": b"old only"}
OTHER = "1" * 64


@pytest.fixture
def store(memory: Path) -> Store:
    return Store(memory / "store")


@pytest.fixture
def new(store: Store) -> Entry:
    return compute(store.root)


@pytest.fixture
def old(store: Store) -> Entry:
    return compute(store.root, key=OTHER, files=OLD)


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


@EVERY
@pytest.mark.parametrize("previous", [True, False], ids=["over a delivery", "first"])
def test_kill_at_every_file_operation(
    memory: Path, store: Store, new: Entry, old: Entry, previous: bool, stride: int
) -> None:
    def fresh(name: str) -> Path:
        out = memory / name / "model"
        if previous:
            store.materialise(old, out)
        return out

    count = fresh("count")
    points = kill_points(lambda: Store(store.root).materialise(new, count))
    assert points > 40
    seen = set()
    for point in range(1 + points % stride, points + 1, stride):
        out = fresh(f"kill-{point}")
        assert run_killed(lambda out=out: Store(store.root).materialise(new, out), point) == -signal.SIGKILL
        found = delivered(out) if out.exists() else {}
        assert found in ((OLD if previous else {}), FILES), point
        seen.add(found == FILES)
        store.materialise(new, out)
        assert delivered(out) == FILES, point
        assert beside(out) == [], point
    assert seen == {True, False}


@EVERY
def test_kill_where_folders_cannot_be_exchanged(
    memory: Path, store: Store, new: Entry, old: Entry, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    """Then there is a moment without the folder; the next delivery puts it back before anything else."""
    monkeypatch.setattr(module, "_renameat2", lambda: None)
    store.materialise(old, memory / "count" / "model")
    points = kill_points(lambda: Store(store.root).materialise(new, memory / "count" / "model"))
    missing = 0
    for point in range(1 + points % stride, points + 1, stride):
        out = memory / f"kill-{point}" / "model"
        store.materialise(old, out)
        run_killed(lambda out=out: Store(store.root).materialise(new, out), point)
        missing += not out.exists()
        module._tidy(out)
        assert delivered(out) in (OLD, FILES), point
        store.materialise(new, out)
        assert delivered(out) == FILES
        assert beside(out) == []
    assert missing > 0 or stride > 1  # the gap is a few moments wide


def test_the_same_result_again_touches_nothing(tmp_path: Path, store: Store, new: Entry) -> None:
    out = store.materialise(new, tmp_path / "model")
    before = snapshot(out)
    store.materialise(new, out)
    assert snapshot(out) == before


def test_damage_in_the_output_is_refused_not_kept(tmp_path: Path, store: Store, new: Entry) -> None:
    out = store.materialise(new, tmp_path / "model")
    path = out / "model.onnx"
    times = path.stat()
    path.write_bytes(b"b" + FILES["model.onnx"][1:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    store.materialise(new, out)
    assert delivered(out) == FILES


def test_a_missing_file_of_ours_comes_back(tmp_path: Path, store: Store, new: Entry) -> None:
    out = store.materialise(new, tmp_path / "model")
    (out / "sub" / "tokenizer.json").unlink()
    store.materialise(new, out)
    assert delivered(out) == FILES


def test_a_copied_output_is_still_ours(tmp_path: Path, store: Store, new: Entry, old: Entry) -> None:
    """Copying changes the times; the content says that it is what we wrote."""
    store.materialise(old, tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy", copy_function=shutil.copyfile)
    store.materialise(new, tmp_path / "copy")
    assert delivered(tmp_path / "copy") == FILES


def somebody_else(out: Path, how: str) -> None:
    if how == "only theirs":
        out.mkdir(parents=True)
        (out / "thesis.docx").write_text("years of work")
    elif how == "a file":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("years of work")
    elif how == "same names, no marker":
        (out / "sub").mkdir(parents=True)
        (out / "model.onnx").write_text("years of work")
    elif how == "beside ours":
        (out / "sub" / "notes.txt").write_text("years of work")
    elif how == "edited":
        (out / "model.onnx").write_text("years of work")
    elif how == "edited, same size":
        (out / "model.onnx").write_bytes(b"new")
    elif how == "a link":
        target = out.parent / "theirs.txt"
        target.write_text("years of work")
        (out / "model.onnx").unlink()
        (out / "model.onnx").symlink_to(target)
    elif how == "a linked folder":
        target = out.parent / "theirs"
        target.mkdir()
        (target / "only.txt").write_bytes(b"old only")
        shutil.rmtree(out / "old")
        (out / "old").symlink_to(target)
    elif how == "broken marker":
        (out / ".olive-output.json").write_text("{")


THEIRS = ["only theirs", "a file", "same names, no marker"]
MIXED = ["edited", "edited, same size", "a link", "a linked folder", "broken marker", "beside ours"]


@pytest.mark.parametrize("how", THEIRS + MIXED)
def test_somebody_elses_files_are_refused_and_kept(
    tmp_path: Path, store: Store, new: Entry, old: Entry, how: str
) -> None:
    out = tmp_path / "out" / "model"
    if how in MIXED:
        store.materialise(old, out)
        (out / "sub").mkdir(exist_ok=True)
    somebody_else(out, how)
    before = snapshot(out.parent)
    with pytest.raises(ConfigError, match="left as it is") as caught:
        store.materialise(new, out)
    assert caught.value.exit_code == 2
    assert snapshot(out.parent) == before


def test_a_file_put_there_during_delivery_is_kept(
    tmp_path: Path, store: Store, new: Entry, old: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = store.materialise(old, tmp_path / "out" / "model")
    real = module._swap

    def late(fresh: Path, dest: Path) -> None:
        (out / "thesis.docx").write_text("years of work")
        monkeypatch.setattr(module, "_swap", real)
        real(fresh, dest)

    monkeypatch.setattr(module, "_swap", late)
    with pytest.raises(ConfigError, match=r"thesis\.docx") as caught:
        store.materialise(new, out)
    assert str(out) in str(caught.value)
    assert delivered(out) == {**OLD, "thesis.docx": b"years of work"}
    assert beside(out) == []


@pytest.mark.parametrize("name", ["../theirs.txt", "sub/../../theirs.txt"])
def test_a_forged_marker_deletes_nothing_outside(tmp_path: Path, store: Store, new: Entry, name: str) -> None:
    out = tmp_path / "out" / "model"
    out.mkdir(parents=True)
    theirs = tmp_path / "out" / "theirs.txt"
    theirs.write_text("years of work")
    forged = {"digest": "0" * 64, "time": 0, "files": {name: [13, "0"], str(theirs): [13, "0"]}}
    (out / ".olive-output.json").write_text(json.dumps(forged))
    store.materialise(new, out)
    assert theirs.read_text() == "years of work"


def test_a_linked_output_folder_is_followed(tmp_path: Path, store: Store, new: Entry, old: Entry) -> None:
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "out").symlink_to(real)
    store.materialise(old, tmp_path / "out")
    store.materialise(new, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert delivered(real) == FILES


def test_odd_folder_names(tmp_path: Path, store: Store, new: Entry, old: Entry) -> None:
    for name in ("model[1]*?", "mit Leerzeichen", "模型", "-rf"):
        store.materialise(old, tmp_path / name)
        store.materialise(new, tmp_path / name)
        assert delivered(tmp_path / name) == FILES


def test_copies_share_nothing_with_the_store(tmp_path: Path, store: Store, new: Entry) -> None:
    out = store.materialise(new, tmp_path / "model")
    for name in FILES:
        assert (out / name).stat().st_nlink == 1
        assert not (out / name).is_symlink()
        (out / name).write_bytes(b"changed by its user")
    assert Store(store.root).lookup(KEY) is not None


def test_a_hard_link_in_the_staging_folder_is_parted(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    original = tmp_path / "weights"
    original.write_bytes(b"w" * 1000)
    with store.stage() as staging:
        os.link(original, staging.path / "weights")
        entry = store.publish(staging, KEY, {}, {})
    assert (entry.path / "weights").stat().st_nlink == 1
    original.write_bytes(b"x" * 1000)
    assert Store(store.root).lookup(KEY) is not None


def test_a_symbolic_link_in_the_staging_folder_is_refused(tmp_path: Path, store: Store) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    with store.stage() as staging:
        (staging.path / "weights").symlink_to(tmp_path / "weights")
        with pytest.raises(PassFailed, match="no regular file"):
            store.publish(staging, KEY, {}, {})
    assert Store(store.root).lookup(KEY) is None


def test_onnx_external_data_loads_where_delivered(tmp_path: Path, store: Store) -> None:
    """onnx and onnx-ir refuse external data with a second hard link, ONNX Runtime an escaping symlink."""
    numpy = pytest.importorskip("numpy")
    onnx = pytest.importorskip("onnx")
    onnx_ir = pytest.importorskip("onnx_ir")
    runtime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy.arange(4096, dtype=numpy.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4096]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        ports[:1],
        ports[1:],
        initializer=[numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    with store.stage() as staging:
        path = str(staging.path / "model.onnx")
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
        entry = store.publish(staging, KEY, {}, {})
    out = store.materialise(entry, tmp_path / "out" / "model")
    for folder in (entry.path, out):
        loaded = onnx.load(folder / "model.onnx")
        assert (numpy_helper.to_array(loaded.graph.initializer[0]) == weights).all()
        read = onnx_ir.load(folder / "model.onnx").graph.initializers["w"].const_value.numpy()
        assert (read == weights).all()
        session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        assert (session.run(None, {"x": weights})[0] == 2 * weights).all()
