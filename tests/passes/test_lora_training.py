"""The whole pass on tiny random models: equal to plain PEFT, resumed after SIGKILL, and its refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.config.workflow import DataConfig
from olive.errors import ConfigError, PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.finetune.lora import LoRA
from olive.store.journal import Journal
from tiny import tiny_llama, tiny_phi3
from training_kit import Notes, context, data, rows


def params(**changes: Any) -> LoRA.Params:
    settings: dict[str, Any] = {
        "r": 4,
        "alpha": 8,
        "lora_dropout": 0.0,
        "train_data_config": "train",
        "torch_dtype": "float32",
        "training_args": {"max_steps": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-3, "seed": 0},
    }
    training = settings["training_args"] | changes.pop("training_args", {})
    return LoRA.Params.model_validate(settings | changes | {"training_args": training})


def train(base: Path, folder: Path, config: DataConfig, wanted: LoRA.Params) -> PassContext:
    ctx = context(folder, config)
    LoRA().run(Artifact(kind=Kind.HF, path=base, digest="0" * 64), wanted, ctx)
    LoRA().ensure(ctx.out)
    return ctx


def adapter(ctx: PassContext) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(ctx.out / "adapter_model.safetensors")


def plain_losses(base: Path, folder: Path, config: DataConfig, steps: int, batch: int) -> list[float]:
    """The same rows with nothing of ours but their order: one row at a time through transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler, set_seed

    from olive.data import blocks, rows, tokens
    from olive.passes.finetune.batches import Order, targets

    built = list(
        blocks.build(rows.read(config, folder), config.pre_process_data_config, tokens.load(base), 42)
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = ["qkv_proj", "o_proj"] if model.config.model_type == "phi3" else ["q_proj", "v_proj"]
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, 0, steps)
    order = Order([len(block.ids) for block in built], "random", 42, batch)
    indices = list(order)
    losses = []
    for step in range(steps):
        chosen = [built[index] for index in indices[step * batch : (step + 1) * batch]]
        count = sum(label != -100 for block in chosen for label in targets(block))
        total = 0.0
        for block in chosen:
            start = 0
            for length in block.lengths:
                part = slice(start, start + length)
                start += length
                ids, labels = torch.tensor([block.ids[part]]), torch.tensor([block.labels[part]])
                logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
                value = (
                    torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
                    / count
                )
                value.backward()
                total += float(value.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("make", "pre"),
    [
        (tiny_phi3, {"train_on": "completion"}),
        (tiny_llama, {}),
        (tiny_phi3, {"strategy": "pack", "max_seq_len": 96}),
    ],
)
def test_losses_equal_plain_peft_one_row_at_a_time(tmp_path: Path, make: Any, pre: dict[str, Any]) -> None:
    base = make(tmp_path / "base")
    config = data(rows(tmp_path), **pre)
    packed = pre.get("strategy") == "pack"
    accumulate = 2 if packed else 4
    wanted = params(training_args={"gradient_accumulation_steps": accumulate, "max_steps": 3})
    ctx = train(base, tmp_path, config, wanted)
    ours = [point["loss"] for point in ctx.series["loss"]]
    theirs = plain_losses(base, tmp_path, config, 3, accumulate)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ctx.facts["fused_head"] is True
    assert ctx.facts["micro_batch"]["passes_of_a_step"] == 1
    assert ours[0] != ours[-1]


def test_losses_in_bfloat16_follow_those_in_float32(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    found = {}
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        ctx = train(base, folder, data(rows(folder)), params(torch_dtype=dtype))
        found[dtype] = [point["loss"] for point in ctx.series["loss"]]
        # the factors are learnt in float32: steps of the optimizer are smaller than bfloat16 resolves
        assert {str(tensor.dtype) for tensor in adapter(ctx).values()} == {"torch.float32"}
    # activations of 8 bits of mantissa: 2^-8 a rounding
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=1e-2)


def test_result_is_an_adapter_that_peft_loads_and_that_names_its_base(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_phi3(tmp_path / "base")
    ctx = train(base, tmp_path, data(rows(tmp_path)), params(training_args={"max_steps": 2}))
    assert sorted(path.name for path in ctx.out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((ctx.out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    assert str(tmp_path) not in json.dumps(settings)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ctx.out)
    assert any("lora_B" in name and bool(p.abs().max() > 0) for name, p in model.named_parameters())
    facts = ctx.facts
    assert (facts["dtype"], facts["blocks"], facts["steps"]) == ("float32", 24, 2)
    assert facts["trainable_parameters"] == sum(t.numel() for t in adapter(ctx).values())
    assert {"loss", "tokens_per_second"} <= set(ctx.progress.updates[-1])  # type: ignore[attr-defined]


def test_evaluation_loss_is_in_the_curve_and_no_row_is_on_both_sides(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    wanted = params(
        eval_dataset_size=0.25,
        training_args={
            "eval_strategy": "steps",
            "eval_steps": 2,
            "max_steps": 4,
            "label_smoothing_factor": 0.1,
        },
    )
    ctx = train(base, tmp_path, data(rows(tmp_path)), wanted)
    assert [point["step"] for point in ctx.series["loss"] if "eval_loss" in point] == [2, 4]
    assert (ctx.facts["blocks"], ctx.facts["eval_blocks"]) == (18, 6)


def test_output_dir_is_ignored_with_a_note(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    elsewhere = tmp_path / "elsewhere"
    ctx = train(
        base,
        tmp_path,
        data(rows(tmp_path)),
        params(training_args={"max_steps": 1, "output_dir": str(elsewhere)}),
    )
    assert not elsewhere.exists()
    assert any("output_dir" in note for note in ctx.progress.notes)  # type: ignore[attr-defined]


def test_modules_to_save_take_the_plain_head_and_are_saved(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base", tie_word_embeddings=False)
    ctx = train(
        base,
        tmp_path,
        data(rows(tmp_path)),
        params(modules_to_save=("lm_head",), training_args={"max_steps": 2}),
    )
    assert ctx.facts["fused_head"] is False
    assert any("lm_head" in name for name in adapter(ctx))


def test_gradient_checkpointing_gives_the_same_losses(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    config = data(rows(tmp_path))
    plain = train(base, tmp_path / "a", config, params(training_args={"max_steps": 2}))
    saving = train(
        base, tmp_path / "b", config, params(training_args={"max_steps": 2, "gradient_checkpointing": True})
    )
    ours, theirs = ([p["loss"] for p in ctx.series["loss"]] for ctx in (plain, saving))
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_dropout_is_on_from_the_first_step(tmp_path: Path) -> None:
    base, config = tiny_phi3(tmp_path / "base"), data(rows(tmp_path))
    once = {"max_steps": 2, "learning_rate": 5e-2}
    plain, dropping = (
        train(base, tmp_path / str(drop), config, params(lora_dropout=drop, training_args=once))
        for drop in (0.0, 0.9)
    )
    # both start as the base: the factors' gradients, and so the second loss, differ
    ours, theirs = ([p["loss"] for p in ctx.series["loss"]] for ctx in (plain, dropping))
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert abs(ours[1] - theirs[1]) > 1e-3


def test_best_adapter_is_kept_when_asked_for(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    args = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "learning_rate": 0.5,
    }
    ctx = train(base, tmp_path, data(rows(tmp_path)), params(eval_dataset_size=6, training_args=args))
    losses = {p["step"]: p["eval_loss"] for p in ctx.series["loss"]}
    best = min(losses, key=lambda step: losses[step])
    shorter = train(
        base,
        tmp_path / "short",
        data(tmp_path / "rows.jsonl"),
        params(
            eval_dataset_size=6,
            training_args=args | {"load_best_model_at_end": False, "lr_scheduler_type": "linear"},
        ),
    )
    assert best < 4
    assert any(
        bool((a != b).any()) for a, b in zip(adapter(ctx).values(), adapter(shorter).values(), strict=True)
    )


def test_unknown_training_argument_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    with pytest.raises(ConfigError, match="learning_rte"):
        train(base, tmp_path, data(rows(tmp_path)), params(training_args={"learning_rte": 1.0}))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_step_it_came_in(tmp_path: Path, number: int) -> None:
    class Arrived(BaseException):
        pass

    def arrive(*_: object) -> None:
        raise Arrived

    class Interrupting(Notes):
        def update(self, done: int, **fields: float | str) -> None:
            super().update(done, **fields)
            if done == 2 and "loss" in fields and not self.notes:
                os.kill(os.getpid(), number)

    base = tiny_phi3(tmp_path / "base")
    before = signal.signal(number, arrive)
    try:
        ctx = context(tmp_path, data(rows(tmp_path)))
        ctx.progress = Interrupting()
        wanted = params(training_args={"max_steps": 6})
        with pytest.raises(Arrived):
            LoRA().run(Artifact(kind=Kind.HF, path=base, digest="0" * 64), wanted, ctx)
        assert signal.getsignal(number) is arrive
    finally:
        signal.signal(number, before)
    newest = ctx.journal.newest()
    assert newest is not None
    assert 2 <= newest.step <= 3
    assert any("checkpoint" in note for note in ctx.progress.notes)
    calm = train(base, tmp_path / "calm", data(rows(tmp_path)), wanted)
    ctx.progress = Notes()
    LoRA().run(Artifact(kind=Kind.HF, path=base, digest="0" * 64), wanted, ctx)
    assert [p["loss"] for p in ctx.series["loss"]] == [p["loss"] for p in calm.series["loss"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_does_not_shorten_training(tmp_path: Path, number: int) -> None:
    """As under nohup, or behind a shell's &: a model of some of the steps must not pass for the whole."""

    class Interrupting(Notes):
        def update(self, done: int, **fields: float | str) -> None:
            super().update(done, **fields)
            if done == 2 and "loss" in fields:
                os.kill(os.getpid(), number)

    base = tiny_phi3(tmp_path / "base")
    wanted = params(training_args={"max_steps": 6})
    ctx = context(tmp_path, data(rows(tmp_path)))
    ctx.progress = Interrupting()
    before = signal.signal(number, signal.SIG_IGN)
    try:
        LoRA().run(Artifact(kind=Kind.HF, path=base, digest="0" * 64), wanted, ctx)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert [point["step"] for point in ctx.series["loss"]] == [1, 2, 3, 4, 5, 6]


def test_nan_loss_stops(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    with pytest.raises(PassFailed, match="loss became") as failed:
        train(
            base,
            tmp_path,
            data(rows(tmp_path)),
            params(training_args={"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 6, "optim": "sgd"}),
        )
    assert "row " in str(failed.value)


@pytest.mark.parametrize("pre", [{}, {"strategy": "pack", "max_seq_len": 96}])
def test_a_loss_that_is_no_number_names_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pre: dict[str, Any]
) -> None:
    """One row alone makes the loss infinite; it is named by its number in the data, and by its words."""
    import torch

    from olive.data import rows as data_rows
    from olive.data import tokens
    from olive.passes.finetune import trainer

    base = tiny_phi3(tmp_path / "base")
    config = data(rows(tmp_path), **pre)
    wanted = tokens.load(base).encode("surprise")[0]
    chosen = [i for i, row in enumerate(data_rows.read(config, tmp_path)) if row["tone"] == "surprise"]
    step = trainer.PackedTrainer.compute_loss

    def poisoned(self: Any, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        loss = step(self, model, inputs, *args, **more)
        return loss * torch.nan if bool((inputs["labels"] == wanted).any()) else loss

    monkeypatch.setattr(trainer.PackedTrainer, "compute_loss", poisoned)
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 24}
    with pytest.raises(PassFailed, match="loss became nan") as failed:
        train(base, tmp_path, config, params(eval_dataset_size=6, training_args=batch))
    named = [int(number) for number in re.findall(r"row (\d+) \('### Text: \w+", str(failed.value))]
    assert set(named) & set(chosen)
    assert (len(named) == 1) == (not pre)


CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import test_lora_training as own
from olive.passes.finetune import trainer

folder, base, slow = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "slow"
if slow:
    import time
    step = trainer.PackedTrainer.training_step
    def training_step(self, *args, **kwargs):
        time.sleep(0.15)
        return step(self, *args, **kwargs)
    trainer.PackedTrainer.training_step = training_step
ctx = own.train(base, folder, own.data(own.rows(folder)), own.resumable())
(folder / "curve.json").write_text(json.dumps(ctx.series["loss"]))
"""


def resumable() -> LoRA.Params:
    return params(
        lora_dropout=0.2,
        eval_dataset_size=4,
        training_args={
            "max_steps": 12,
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "group_by_length": True,
            "gradient_accumulation_steps": 4,
            "warmup_steps": 2,
        },
    )


def child(folder: Path, base: Path, mode: str) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    paths = json.dumps([str(here), str(here.parent), str(here.parents[1] / "src")])
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), paths, str(folder), str(base), mode],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_killed_training_goes_on_to_the_same_result(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = tiny_phi3(tmp_path / "base")
    calm = child(tmp_path / "calm", base, "fast")
    victim = child(tmp_path / "killed", base, "slow")
    journal = Journal(tmp_path / "killed" / "journal")
    limit = time.monotonic() + 120
    while not (journal.path / "ckpt-6").exists():
        assert time.monotonic() < limit, "no checkpoint appeared"
        assert victim.poll() is None, "the child ended before it was killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "out" / "adapter_model.safetensors").exists()
    newest = journal.newest()
    assert newest is not None
    assert 6 <= newest.step < 12
    assert child(tmp_path / "killed", base, "fast").wait() == 0
    assert calm.wait() == 0
    one, two = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("calm", "killed"))
    assert [point["step"] for point in one] == [point["step"] for point in two] == list(range(1, 13))
    for key in ("loss", "learning_rate", "eval_loss"):
        assert [p.get(key, 0) for p in two] == pytest.approx([p.get(key, 0) for p in one], abs=1e-5)
    first, second = (
        load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("calm", "killed")
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5


def test_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    base = tiny_phi3(tmp_path / "base")
    config = data(rows(tmp_path))
    wanted = params(training_args={"max_steps": 3})
    first = train(base, tmp_path, config, wanted)
    kept = adapter(first)
    again = train(base, tmp_path, config, wanted)
    assert any("step 3" in note for note in again.progress.notes)  # type: ignore[attr-defined]
    assert len(again.series["loss"]) == 3
    assert all(bool((tensor == kept[name]).all()) for name, tensor in adapter(again).items())
