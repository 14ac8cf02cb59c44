"""Every loss over pairs against TRL's in the same process, and at its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import preference_kit
from olive.passes.finetune.dpo import DPO
from olive.passes.finetune.preference_loss import DPO_LOSSES, DPOLoss, ORPOLoss, Scores, _log1mexp
from tiny import tiny_phi3


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Scores]:
    """TRL's DPO trainer, a batch of it, and the scores of that batch from whole logits in float64."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    base = tiny_phi3(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = preference_kit.trl_trainer("DPO", model, tokenizer, preference_kit.pairs(6), folder)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(6)])
    sums = [_logps(model, batch, off=off) for off in (False, True)]
    tokens = batch["completion_mask"].sum(1).double()
    halves = [half for values in (*sums, tokens) for half in values.chunk(2)]
    return trainer, batch, Scores(*halves)


def _logps(model: Any, batch: Any, *, off: bool) -> torch.Tensor:
    with torch.no_grad():
        if off:
            with model.disable_adapter():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        else:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    found = logits.double().log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
    return (found * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_each_loss_is_that_of_trl(trl: Any, name: str) -> None:
    trainer, batch, scores = trl
    smoothing = 0.1 if name in ("robust", "exo_pair") else 0.0
    trainer.loss_types, trainer.loss_weights = [name], [1.0]
    trainer.beta, trainer.label_smoothing = 0.4, smoothing
    ours = DPOLoss(name, 0.4, smoothing)
    with torch.no_grad():
        wanted = float(trainer.compute_loss(trainer.model, batch))
    # TRL in float32, ours here in float64
    assert float(ours.losses(scores).mean()) == pytest.approx(wanted, rel=1e-4)
    flat = Scores(*(torch.ones_like(scores.chosen),) * 6)
    assert abs(wanted - float(ours.losses(flat).mean())) > 1e-3  # the model is not where it started
    chosen, rejected = ours.rewards(scores)
    figures = trainer._metrics["train"]
    assert float((chosen - rejected).mean()) == pytest.approx(figures["rewards/margins"][-1], rel=1e-4)
    right = float((chosen > rejected).double().mean())
    assert right == pytest.approx(figures["rewards/accuracies"][-1], abs=1e-6)


def test_every_loss_of_the_pass_is_there() -> None:
    given = DPO.Params.model_fields["loss_type"].annotation
    assert set(given.__args__) == set(DPO_LOSSES)  # type: ignore[union-attr]


def test_log_of_one_minus_an_exponential_is_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-3, -0.5, -0.7, -5.0, -40.0], requires_grad=True)
    wide = x.detach().double().requires_grad_()
    value, wanted = _log1mexp(x), torch.log1p(-torch.exp(wide))
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-30)
    value.sum().backward()
    wanted.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-30)


def test_a_certain_answer_gives_finite_odds() -> None:
    chosen = torch.tensor([0.0, -1e-9, -1.0], requires_grad=True)
    rejected = torch.tensor([-300.0, -3.0, 0.0], requires_grad=True)
    one = torch.ones(3)
    loss = ORPOLoss(0.5).losses(Scores(chosen, rejected, 0 * one, 0 * one, one, one)).sum()
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(x.grad.isfinite().all()) for x in (chosen, rejected) if x.grad is not None)


def test_the_odds_ratio_is_that_of_the_paper() -> None:
    p, q = 0.6, 0.2  # equations 4 and 7, per token
    odds = (p / (1 - p)) / (q / (1 - q))
    wanted = -0.3 * float(torch.tensor(odds / (1 + odds)).double().log())
    logs = [torch.tensor([x]).double().log() * n for x, n in ((p, 5), (q, 2))]
    zero = torch.zeros(1)
    scores = Scores(*logs, zero, zero, torch.tensor([5.0]), torch.tensor([2.0]))
    assert float(ORPOLoss(0.3).losses(scores)) == pytest.approx(wanted, rel=1e-6)
