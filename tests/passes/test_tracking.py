"""Experiment trackers: what they wrote is read back and is our curve; none of them can end a training."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_lora_training import adapter, params, train

from olive.engine.output import check_output
from olive.passes.finetune import tracking
from olive.passes.finetune.tracking import TRACKERS, asked, check
from tiny import tiny_phi3
from training_kit import data, rows

SET = [name for tracker in TRACKERS.values() for name in (tracker.folder, *tracker.defaults)]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET:
        monkeypatch.delenv(name, raising=False)


def report(tmp_path: Path, report_to: Any, **more: Any) -> Any:
    base = tmp_path / "base"
    if not base.exists():
        tiny_phi3(base)
    args = {"report_to": report_to, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, **more}
    return train(base, tmp_path / "a", data(rows(tmp_path)), params(eval_dataset_size=6, training_args=args))


def curve(ctx: Any, name: str) -> dict[int, float]:
    return {point["step"]: point[name] for point in ctx.series["loss"] if name in point}


def tensorboard(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(tag)}


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    ctx = report(tmp_path, "tensorboard")
    (run,) = (tmp_path / "a" / "tracking" / "tensorboard").iterdir()
    # TensorBoard keeps float32
    assert tensorboard(run, "train/loss") == pytest.approx(curve(ctx, "loss"), rel=1e-6)
    assert tensorboard(run, "train/learning_rate") == pytest.approx(curve(ctx, "learning_rate"), rel=1e-6)
    assert tensorboard(run, "eval/loss") == pytest.approx(curve(ctx, "eval_loss"), rel=1e-6)
    assert sorted(tensorboard(run, "eval/loss")) == [2, 4]


def test_mlflow(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    ctx = report(tmp_path, ["mlflow"], logging_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(f"file://{tmp_path / 'a' / 'tracking' / 'mlflow'}")
        experiment = client.get_experiment_by_name("olive")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"

        def history(name: str) -> dict[int, float]:
            return {point.step: point.value for point in client.get_metric_history(run.info.run_id, name)}

        losses = {step: loss for step, loss in curve(ctx, "loss").items() if step % 2 == 0}
        assert history("loss") == losses
        assert history("eval_loss") == curve(ctx, "eval_loss")
        assert run.data.params["learning_rate"] == "0.005"
    assert mlflow.active_run() is None


def records(content: bytes) -> Iterator[bytes]:
    """The records of a wandb transaction log: LevelDB's log format behind a header of 7 bytes."""
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = []
    for record in records(path.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        if message.WhichOneof("record_type") == "history":
            items = message.history.item
            found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return found


def test_wandb_stays_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    ctx = report(tmp_path, "wandb")
    history = wandb_history(tmp_path / "a" / "tracking")
    told = {item["train/global_step"]: item["train/loss"] for item in history if "train/loss" in item}
    assert told == curve(ctx, "loss")
    assert {i["train/global_step"]: i["eval/loss"] for i in history if "eval/loss" in i} == curve(
        ctx, "eval_loss"
    )
    # no secret in what was written, and the environment is as it was
    for path in (tmp_path / "a").rglob("*"):
        assert not path.is_file() or b"0123456789abcdef" not in path.read_bytes(), path
    assert not set(SET) & set(os.environ)


def test_off_by_default_and_the_result_is_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    plain = report(tmp_path / "plain", "none")
    assert not (tmp_path / "plain" / "a" / "tracking").exists()
    told = report(tmp_path / "told", "tensorboard")
    assert curve(plain, "loss") == curve(told, "loss")
    found = adapter(told)
    assert all(bool((tensor == found[name]).all()) for name, tensor in adapter(plain).items())


def test_folders_that_the_user_names_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "own"))
    ctx = report(tmp_path, "tensorboard")
    assert tensorboard(tmp_path / "own", "train/loss") == pytest.approx(curve(ctx, "loss"), rel=1e-6)
    assert not (tmp_path / "a" / "tracking").exists()


@pytest.mark.parametrize("event", ["__init__", "on_train_begin", "on_log", "on_train_end"])
def test_a_tracker_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    monkeypatch.setenv("WANDB_API_KEY", "verysecretvalue")

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to https://me:pw@host/?key=verysecretvalue")

    monkeypatch.setattr(TensorBoardCallback, event, broken)
    ctx = report(tmp_path, "tensorboard")
    assert [point["step"] for point in ctx.series["loss"]] == [1, 2, 3, 4]
    (note,) = [note for note in ctx.progress.notes if "tensorboard" in note]
    assert "goes on without it: ConnectionError" in note
    assert "verysecretvalue" not in note


def test_a_resumed_run_tells_the_whole_curve_to_a_new_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    report(tmp_path, "none", max_steps=2, lr_scheduler_type="constant", save_steps=2, eval_strategy="no")
    # the journal's key is the same here: as if the run had been killed after its checkpoint
    state = tmp_path / "a" / "journal" / "ckpt-2" / "manifest.json"
    assert state.exists()
    from olive.store.journal import Journal

    newest = Journal(tmp_path / "a" / "journal").newest()
    assert newest is not None
    files = {path.name: path.read_bytes() for path in newest.path.iterdir()}

    def again(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    Journal(tmp_path / "a" / "journal").commit(2, again, newest.state | {"done": False})
    ctx = report(tmp_path, "mlflow", lr_scheduler_type="constant", save_steps=2, eval_strategy="no")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(f"file://{tmp_path / 'a' / 'tracking' / 'mlflow'}")
        (run,) = client.search_runs([client.get_experiment_by_name("olive").experiment_id])
        history = client.get_metric_history(run.info.run_id, "loss")
    assert {point.step: point.value for point in history} == curve(ctx, "loss")
    assert len(curve(ctx, "loss")) == 4


def test_what_is_asked_for() -> None:
    assert asked({}) == asked({"report_to": "none"}) == asked({"report_to": []}) == []
    assert asked({"report_to": ["wandb", "wandb", "none"]}) == ["wandb"]
    assert set(asked({"report_to": "all"})) <= set(TRACKERS)


def test_a_tracker_that_is_not_there_is_told_at_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    (unknown,) = check({"report_to": ["tensorbord"]})
    assert "'tensorbord'" in unknown.message
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    (missing,) = check({"report_to": "wandb"})
    assert "olive-next[tracking]" in str(missing.fix)
    assert missing.exit_code == 5
    assert list(check({"report_to": "all"})) == []


def test_the_folder_of_trackers_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "out" / "tracking" / "wandb").mkdir(parents=True)
    assert list(check_output(tmp_path / "out", tmp_path / "cache")) == []
