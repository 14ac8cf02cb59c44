"""Early stopping: when it stops, what it saves, and that a killed run counts on where it was."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_lora_training import adapter, params, train

from olive.errors import Severity
from olive.passes.finetune.stopping import Patience, best_point, check
from olive.store.journal import Journal
from tiny import tiny_phi3
from training_kit import data, rows

ARGS: dict[str, Any] = {"eval_steps": 1, "eval_strategy": "steps", "max_steps": 12, "learning_rate": 0.5}


def transformers_stops(losses: list[float], patience: int, threshold: float) -> bool:
    """The same by transformers' EarlyStoppingCallback and the best metric its Trainer keeps beside it."""
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    callback, state = EarlyStoppingCallback(patience, threshold), TrainerState()
    args = TrainingArguments(output_dir="x", metric_for_best_model="eval_loss", use_cpu=True)
    control = TrainerControl()
    for loss in losses:
        control.should_training_stop = False
        callback.on_evaluate(args, state, control, {"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss
    return control.should_training_stop


@settings(deadline=None)
@given(
    # sums and differences of these are exact, so that both sides agree at the threshold itself
    st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=10),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.125, 0.25]),
)
def test_patience_is_that_of_transformers(losses: list[float], patience: int, threshold: float) -> None:
    curve = [{"step": step, "loss": 1.0} for step in range(1, 2 * len(losses) + 1)]
    for index, loss in enumerate(losses):
        curve[2 * index + 1]["eval_loss"] = loss
    before = [{"step": 0, "eval_loss": 0.0}]
    assert Patience(patience, threshold).over(before + curve) == transformers_stops(
        losses, patience, threshold
    )


def test_more_may_be_better() -> None:
    args = {"early_stopping_patience": 2, "metric_for_best_model": "rewards/accuracies"}
    patience = Patience.of(args)
    assert patience == Patience(2, 0.0, "eval_rewards/accuracies", greater=True)
    curve = [{"step": n, "eval_rewards/accuracies": v, "eval_loss": v} for n, v in enumerate((0, 5, 7, 6, 7))]
    assert patience.over(curve)
    assert not patience.over(curve[:-1])
    assert best_point(curve, "eval_rewards/accuracies", greater=True) == curve[2]
    given = args | {"eval_strategy": "epoch"}
    assert list(check(given, True, ("loss", "rewards/accuracies"))) == []


def test_stops_saves_the_best_and_goes_on_counting_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = tiny_phi3(tmp_path / "base"), data(rows(tmp_path))

    def wanted(**more: Any) -> Any:
        return params(eval_dataset_size=6, training_args=ARGS | {"lr_scheduler_type": "constant"} | more)

    kept: list[Path] = []
    commit = Journal.commit

    def copying(self: Journal, step: int, *given: Any) -> None:
        commit(self, step, *given)
        kept.append(tmp_path / f"left-{step}")
        shutil.copytree(self.path, kept[-1] / "journal")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", copying)
        stopped = train(base, tmp_path / "a", config, wanted(early_stopping_patience=3, save_steps=1))
    curve = stopped.series["loss"]
    losses = [point["eval_loss"] for point in curve]
    best = losses.index(min(losses)) + 1
    assert len(curve) == best + 3 < 12
    assert (stopped.facts["best_step"], stopped.facts["best_eval_loss"]) == (best, min(losses))
    assert stopped.facts["stopped_early"] is True
    assert any("stopping early" in note for note in stopped.progress.notes)  # type: ignore[attr-defined]

    # what is saved is what training had at that step, which a training of that many steps ends with
    short = train(base, tmp_path / "b", config, wanted(max_steps=best, load_best_model_at_end=False))
    saved, then = adapter(stopped), adapter(short)
    assert all(bool((tensor == then[name]).all()) for name, tensor in saved.items())

    # after a kill at any checkpoint, the one at which it stopped included, it stops at the same step
    assert len(kept) == len(curve)
    for left in kept:
        again = train(base, left, config, wanted(early_stopping_patience=3, save_steps=1))
        assert [point["eval_loss"] for point in again.series["loss"]] == losses
        assert all(bool((tensor == saved[name]).all()) for name, tensor in adapter(again).items())


def test_best_by_epochs_with_checkpoints_by_the_clock(tmp_path: Path) -> None:
    base, config = tiny_phi3(tmp_path / "base"), data(rows(tmp_path))
    args = {"eval_strategy": "epoch", "num_train_epochs": 6, "max_steps": -1, "early_stopping_patience": 2}
    ctx = train(
        base,
        tmp_path / "a",
        config,
        # no evaluation after the first gains as much; the lowest loss is the best all the same
        params(eval_dataset_size=6, training_args=args | {"early_stopping_threshold": 100.0}),
    )
    points = [point for point in ctx.series["loss"] if "eval_loss" in point]
    assert len(points) == 3
    assert best_point(ctx.series["loss"]) == min(points, key=lambda point: point["eval_loss"])
    assert ctx.facts["best_step"] in [point["step"] for point in points]
    newest = ctx.journal.newest()
    assert newest is not None
    assert newest.step == points[-1]["step"]


@pytest.mark.parametrize(
    ("args", "has_eval", "said"),
    [
        ({"early_stopping_patience": 2, "eval_strategy": "epoch"}, False, ["needs evaluation rows"]),
        ({"early_stopping_patience": 2}, True, ["counts evaluations"]),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, False, ["needs evaluation", "counts eval"]),
        ({"early_stopping_threshold": 0.1}, True, ["stops nothing"]),
        ({"metric_for_best_model": "accuracy"}, True, ["is not measured"]),
        ({"early_stopping_patience": 2, "eval_steps": 5, "greater_is_better": True}, True, ["a loss"]),
        ({"early_stopping_patience": 2, "eval_steps": 5, "metric_for_best_model": "eval_loss"}, True, []),
        ({}, False, []),
    ],
)
def test_what_does_not_go_together_is_told_at_plan(
    args: dict[str, Any], has_eval: bool, said: list[str]
) -> None:
    found = [problem.message for problem in check(args, has_eval) if problem.severity is Severity.ERROR]
    assert len(found) == len(said)
    assert all(part in message for part, message in zip(said, found, strict=True))


def test_the_pass_tells_it(tmp_path: Path) -> None:
    from olive.config.workflow import Accelerator
    from olive.hardware.probe import probe
    from olive.models.hf import describe
    from olive.passes.finetune.lora import LoRA

    wanted = params(training_args={"early_stopping_patience": 2})
    found = LoRA().check(describe(tiny_phi3(tmp_path)), wanted, probe(), Accelerator())
    assert any("needs evaluation rows" in problem.message for problem in found)
