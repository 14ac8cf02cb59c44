"""DPO and ORPO: equal to TRL, resumed after SIGKILL, merged through the gate, better at preferences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import adapter_kit
import preference_kit
from olive.config.gates import MergeGate
from olive.config.workflow import Accelerator
from olive.engine.gates import merge as gate
from olive.errors import ConfigError, PassFailed
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe
from olive.passes.adapters.merge import MergeAdapterWeights
from olive.passes.base import PassContext
from olive.passes.registry import resolve
from olive.store.journal import Journal
from tiny import tiny_llama, tiny_phi3
from training_kit import context

KINDS = ("DPO", "ORPO")
SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def params(kind: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "r": 4,
        "alpha": 8,
        "train_data_config": "train",
        "torch_dtype": "float32",
        "training_args": {"max_steps": 4, "gradient_accumulation_steps": 4, "learning_rate": 5e-3, "seed": 0},
    }
    training = settings["training_args"] | changes.pop("training_args", {})
    return resolve(kind).Params.model_validate(settings | changes | {"training_args": training})


def train(
    kind: str, given: Artifact, folder: Path, rows: list[dict[str, Any]], **changes: Any
) -> PassContext:
    folder.mkdir(exist_ok=True)
    ctx = context(folder, preference_kit.data(preference_kit.write(folder, rows)))
    technique = resolve(kind)()
    technique.run(given, params(kind, **changes), ctx)
    technique.ensure(ctx.out)
    return ctx


def whole(base: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=base, digest="b" * 64)


def adapter(ctx: PassContext) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(ctx.out / "adapter_model.safetensors")


def figures(ctx: PassContext, name: str) -> list[float]:
    return [point[name] for point in ctx.series["loss"] if name in point]


def theirs(
    kind: str, base: Path, folder: Path, rows: list[dict[str, str]], given: Path | None = None, **args: Any
) -> Any:
    """The same run by TRL alone: padded batches of whole logits. Returns its history and its adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    names = ["qkv_proj", "o_proj"] if model.config.model_type == "phi3" else ["q_proj", "v_proj"]
    set_seed(0)
    if given is not None:
        model = PeftModel.from_pretrained(model, given, is_trainable=True)
    else:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = preference_kit.trl_trainer(kind, model, tokenizer, rows, folder, **args)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return history, get_peft_model_state_dict(trainer.model, adapter_name="default")


@pytest.mark.parametrize("make", [tiny_phi3, tiny_llama])
@pytest.mark.parametrize(
    ("kind", "ours", "trl"),
    [
        ("DPO", {}, {}),
        ("DPO", {"loss_type": "ipo", "beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
        ("ORPO", {"beta": 0.5}, {"beta": 0.5}),
    ],
)
def test_equal_to_trl(
    tmp_path: Path, make: Any, kind: str, ours: dict[str, Any], trl: dict[str, Any]
) -> None:
    base, rows = make(tmp_path / "base"), preference_kit.pairs(16)
    ctx = train(kind, whole(base), tmp_path / "ours", rows, training_args=SEQUENTIAL, **ours)
    history, state = theirs(kind, base, tmp_path, rows, **trl)
    assert ctx.facts["fused_head"] is True
    for name in ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"):
        # float32 sums of a hundred logarithms, in another order
        want = [entry[name] for entry in history]
        assert figures(ctx, name) == pytest.approx(want, rel=1e-4, abs=1e-5), name
    assert figures(ctx, "rewards/accuracies")[1:] == [e["rewards/accuracies"] for e in history][1:]
    for name, value in adapter(ctx).items():
        # Adam divides by the size of a gradient, small ones too: 2 % of a step of 5e-3
        assert float((value - state[name]).abs().max()) < 1e-4, name


def test_going_on_from_an_adapter_compares_with_that_adapter_as_trl_does(tmp_path: Path) -> None:
    base, rows = tiny_phi3(tmp_path / "base"), preference_kit.pairs(16)
    first = adapter_kit.make_adapter(base, tmp_path / "first", std=0.05)
    given = adapter_kit.artifact(base, first)
    ctx = train("DPO", given, tmp_path / "ours", rows, training_args=SEQUENTIAL)
    history, state = theirs("DPO", base, tmp_path, rows, first)
    assert figures(ctx, "loss") == pytest.approx([e["loss"] for e in history], abs=1e-5)
    assert figures(ctx, "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    for name, value in adapter(ctx).items():
        assert float((value - state[name]).abs().max()) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_step_is_cut_does_not_matter(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.passes.finetune import memory

    base, rows = tiny_phi3(tmp_path / "base"), preference_kit.pairs()
    held = {"eval_dataset_size": 6, "training_args": {"eval_strategy": "steps", "eval_steps": 2}}
    joined = train(kind, whole(base), tmp_path / "joined", rows, **held)
    monkeypatch.setattr(memory, "MOST_TOKENS", {"cpu": 64})
    cut = train(kind, whole(base), tmp_path / "cut", rows, **held)
    cuts = [ctx.facts["micro_batch"]["passes_of_a_step"] for ctx in (joined, cut)]
    assert cuts[0] == 1 < cuts[1]
    for name in ("loss", "eval_loss", "eval_rewards/margins", "rewards/margins"):
        assert figures(cut, name) == pytest.approx(figures(joined, name), abs=1e-5), name
        assert figures(cut, name)


def test_the_reference_is_computed_once_a_pair_and_without_dropout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from olive.passes.finetune.preference_trainer import PreferenceTrainer

    passes: list[tuple[bool, bool]] = []
    plain = PreferenceTrainer._scores

    def scores(self: Any, model: Any, inputs: Any, start: Any) -> Any:
        if start is None:
            passes.append((self.model.training, torch.is_grad_enabled()))
        return plain(self, model, inputs, start)

    monkeypatch.setattr(PreferenceTrainer, "_scores", scores)
    base = tiny_phi3(tmp_path / "base")
    args = {"max_steps": 12, "learning_rate": 0.0}
    ctx = train(
        "DPO",
        whole(base),
        tmp_path / "a",
        preference_kit.pairs(16),
        lora_dropout=0.5,
        training_args=args,
    )
    assert passes == [(False, False)] * 4  # four steps an epoch, and three epochs
    # B is zero: dropout on the way to it changes nothing
    assert figures(ctx, "loss") == pytest.approx([0.693147] * 12, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_preferences_are_learnt_and_merged_through_the_gate(tmp_path: Path, kind: str) -> None:
    base = tiny_phi3(tmp_path / "base")
    args = {"max_steps": 30, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 30}
    ctx = train(
        kind, whole(base), tmp_path / "train", preference_kit.pairs(48), eval_dataset_size=12,
        target_modules="all-linear", training_args=args | {"eval_on_start": True},
    )  # fmt: skip
    margins, accuracies = figures(ctx, "eval_rewards/margins"), figures(ctx, "eval_rewards/accuracies")
    assert margins[-1] > margins[0]
    assert accuracies[0] < 0.9 <= accuracies[-1]
    assert ctx.facts["eval_rewards_accuracies"] == accuracies[-1]
    assert ctx.attributes == {"dtype": "float32", "r": 4, "alpha": 8.0}
    given = adapter_kit.artifact(base, ctx.out)
    merge = adapter_kit.context(tmp_path / "merge")
    MergeAdapterWeights().run(given, MergeAdapterWeights.Params(), merge)
    prompt = [5, 9, 40, 77, 200, 31, 8, 150]
    result = gate.check(given, merge.out, MergeGate(), adapter_kit.context(tmp_path / "gate"), [prompt])
    assert result.figures["kl"] < 1e-6


def test_nan_loss_stops(tmp_path: Path) -> None:
    args = {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 6, "optim": "sgd"}
    with pytest.raises(PassFailed, match="loss became"):
        train(
            "DPO",
            whole(tiny_phi3(tmp_path / "base")),
            tmp_path / "a",
            preference_kit.pairs(),
            training_args=args,
        )


@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ("lm_head",)}, {"training_args": {"gradient_checkpointing": True}}],
)
def test_a_trained_head_and_checkpointed_layers_start_at_their_reference(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = tiny_phi3(tmp_path / "base", tie_word_embeddings=False)
    ctx = train("DPO", whole(base), tmp_path / "a", preference_kit.pairs(16), **changes)
    losses = figures(ctx, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1] < 0.69
    assert ctx.facts["fused_head"] is ("modules_to_save" not in changes)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("DPO", {"label_smoothing": 0.1}, "no effect on loss_type sigmoid"),
        ("DPO", {"loss_type": "exo_pair"}, "infinite without label_smoothing"),
        ("ORPO", {"training_args": {"label_smoothing_factor": 0.1}}, "smooths the tokens"),
    ],
)
def test_settings_that_do_not_fit_are_told_at_plan(
    tmp_path: Path, kind: str, changes: dict[str, Any], said: str
) -> None:
    info = describe(tiny_phi3(tmp_path / "base"))
    found = resolve(kind)().check(info, params(kind, **changes), probe(), Accelerator())
    assert [said in problem.message for problem in found] == [True]


def test_rows_without_preferences_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 4
    with pytest.raises(ConfigError, match="pairs of a chosen and a rejected answer are needed"):
        train("DPO", whole(tiny_phi3(tmp_path / "base")), tmp_path / "a", rows)


CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[1])
import test_preference as own
from olive.passes.finetune import trainer

folder, base, slow = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "slow"
if slow:
    import time
    step = trainer.PackedTrainer.training_step
    def training_step(self, *args, **kwargs):
        time.sleep(0.15)
        return step(self, *args, **kwargs)
    trainer.PackedTrainer.training_step = training_step
own.resumable(base, folder)
"""


def resumable(base: Path, folder: Path) -> None:
    ctx = train(
        "DPO",
        whole(base),
        folder,
        preference_kit.pairs(20),
        lora_dropout=0.2,
        eval_dataset_size=4,
        training_args={"max_steps": 12, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
    )
    (folder / "curve.json").write_text(json.dumps(ctx.series["loss"]))


def child(folder: Path, base: Path, mode: str) -> subprocess.Popen[bytes]:
    here = Path(__file__).parent
    paths = json.dumps([str(here), str(here.parent), str(here.parents[1] / "src")])
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
    newest = journal.newest()
    assert newest is not None
    assert 6 <= newest.step < 12
    assert child(tmp_path / "killed", base, "fast").wait() == 0
    assert calm.wait() == 0
    one, two = (json.loads((tmp_path / name / "curve.json").read_text()) for name in ("calm", "killed"))
    assert [point["step"] for point in one] == [point["step"] for point in two] == list(range(1, 13))
    names = {name for point in one for name in point} - {"tokens_per_second"}
    assert {"loss", "rewards/margins", "eval_rewards/accuracies"} <= names
    for name in names:
        assert [p.get(name, 0) for p in two] == pytest.approx([p.get(name, 0) for p in one], abs=1e-5)
    first, second = (
        load_file(tmp_path / n / "out" / "adapter_model.safetensors") for n in ("calm", "killed")
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5
