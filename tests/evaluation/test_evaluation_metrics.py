from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from olive.config.workflow import DataConfig, Metric, SubMetric
from olive.data import tokens
from olive.errors import ConfigError, PassFailed
from olive.evaluation.metrics import accuracy
from olive.evaluation.session import Session
from olive.models.artifact import Artifact, Kind

ACCURACY = Metric(name="tone", type="accuracy", data_config="tones", batch_size=4)


@pytest.fixture(params=["hf", "genai"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_model")


def _say(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """Let the model answer the n-th row with the n-th text, whatever the batches are."""

    def generate(metric: Metric, session: Session, prompts: list[list[int]], *, one_line: bool) -> list[str]:
        assert one_line
        return texts

    monkeypatch.setattr(accuracy, "generate", generate)


def test_scores_agree_with_scikit_learn(
    measure: Any, hf_model: Artifact, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(0)
    labels = ["anger", "fear", "joy", "sadness"]
    expected = [draw.choice(labels[1:]) for _ in range(60)]
    said = [draw.choice([tone, tone, *labels, "joyful", "joy and fear", "", "Joy"]) for tone in expected]
    (tmp_path / "rows.json").write_text(
        json.dumps([{"phrase": "so it goes", "tone": tone} for tone in expected])
    )
    _say(monkeypatch, said)
    scores = measure(hf_model, ACCURACY.model_copy(update={"labels": tuple(labels)}))
    right = accuracy_score(expected, said)
    assert scores["tone", "accuracy_score"].value == pytest.approx(right, abs=1e-6)
    assert scores["tone", "exact_match"].value == pytest.approx(right, abs=1e-12)
    seen = sorted(set(expected) | (set(said) & set(labels)))
    assert scores["tone", "f1_score"].value == pytest.approx(
        f1_score(expected, said, labels=seen, average="macro", zero_division=0), abs=1e-6
    )
    assert {score.count for score in scores.values()} == {60}
    assert 0 < scores["tone", "exact_match"].spread < 0.15
    assert all(score.higher_is_better and score.unit == "" for score in scores.values())


def test_an_answer_is_the_generated_line_alone(
    measure: Any, model: Artifact, hf_folder: Path, data: DataConfig, tmp_path: Path
) -> None:
    """The label is what the model itself says: then, and only then, accuracy is 1."""
    said: list[str] = []
    tokenizer = tokens.load(hf_folder)

    class Echo:
        context_length = 0

        def generate(self, prompts: Any, new: int, stops: frozenset[int]) -> list[list[int]]:
            line = tokenizer.encode("\n")[0]
            assert line in stops
            assert tokenizer.eos_id in stops
            texts = {"sadness": "sadness", "joy": " joy \n", "fear": "fear", "surprise": "surprised"}
            found = []
            for prompt in prompts:
                text = tokenizer.decode(prompt)
                tone = next(
                    row["tone"]
                    for row in json.loads((tmp_path / "rows.json").read_text())
                    if row["phrase"] in text
                )
                said.append(text)
                found.append(tokenizer.encode(texts[tone]))
            return found

        def close(self) -> None: ...

    import olive.evaluation.session as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_open", lambda *_: Echo())
        scores = measure(model, ACCURACY)
    assert scores["tone", "exact_match"].value == pytest.approx(5 / 6)
    assert all(text.endswith("### The tone is:\n") for text in said)
    assert len(said) == 6


def test_both_runtimes_say_the_same(
    measure: Any, hf_model: Artifact, genai_model: Artifact, hf_folder: Path
) -> None:
    hf, genai = measure(hf_model, ACCURACY), measure(genai_model, ACCURACY)
    assert [score.value for score in hf.values()] == [score.value for score in genai.values()]


def test_line_ends_are_found(hf_folder: Path) -> None:
    tokenizer = tokens.load(hf_folder)
    ends = accuracy.line_ends(tokenizer)
    assert tokenizer.encode("\n")[0] in ends
    assert all("\n" in tokenizer.decode([token]) for token in ends)
    assert tokenizer.encode("a")[0] not in ends


def test_answers_outside_the_labels_are_the_authors_mistake(measure: Any, hf_model: Artifact) -> None:
    with pytest.raises(ConfigError, match=r"3 rows have answers outside its labels: 'fear', 'surprise'"):
        measure(hf_model, ACCURACY.model_copy(update={"labels": ("joy", "sadness")}))


def test_prompts_beyond_the_context_are_refused(measure: Any, hf_model: Artifact, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"phrase": "x " * 600, "tone": "joy"}]))
    with pytest.raises(ConfigError, match=r"row 0 has .* beyond the model's context of 512"):
        measure(hf_model, ACCURACY)


@pytest.mark.parametrize("strategy", ["line-by-line", "pack", "join"])
@pytest.mark.parametrize("train_on", ["all", "completion"])
def test_perplexity_is_exp_of_the_mean_loss(
    measure: Any,
    model: Artifact,
    hf_folder: Path,
    data: DataConfig,
    tmp_path: Path,
    strategy: str,
    train_on: str,
) -> None:
    from transformers import AutoModelForCausalLM

    from olive.data import blocks, rows

    pre = data.pre_process_data_config.model_copy(
        update={"strategy": strategy, "train_on": train_on, "max_seq_len": 64}
    )
    config = data.model_copy(update={"pre_process_data_config": pre})
    scores = measure(model, Metric(name="p", type="perplexity", data_config="tones"), config=config)
    reference = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float64).eval()
    total, count = 0.0, 0
    for block in blocks.build(rows.read(config, tmp_path), pre, tokens.load(hf_folder), 0):
        start = 0
        for length in block.lengths:
            ids = torch.tensor([block.ids[start : start + length]])
            labels = torch.tensor([block.labels[start : start + length]])
            with torch.inference_mode():
                logits = reference(ids).logits
            total += float(
                torch.nn.functional.cross_entropy(
                    logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
                )
            )
            count += int((labels[0, 1:] != -100).sum())
            start += length
    score = scores["p", "perplexity"]
    # float32 against float64: 1e-3 relative after the exponential.
    assert score.value == pytest.approx(math.exp(total / count), rel=1e-3)
    assert score.count == count
    assert not score.higher_is_better


def test_latency_and_throughput_come_from_the_same_runs(measure: Any, model: Artifact) -> None:
    settings: dict[str, Any] = {"warmup": 1, "repeat": 4, "prompt_tokens": 16, "new_tokens": 8}
    scores = measure(
        model,
        Metric(name="latency", type="latency", **settings),
        Metric(name="speed", type="throughput", **settings),
    )
    value = {name: scores["latency", name].value for name in ("min", "p50", "p90", "p99", "max", "avg")}
    assert 0 < value["min"] <= value["p50"] <= value["p90"] <= value["p99"] <= value["max"]
    assert value["min"] <= value["avg"] <= value["max"]
    first, later = scores["latency", "first_token"].value, scores["latency", "per_token"].value
    assert first + 7 * later == pytest.approx(value["avg"])
    assert scores["speed", "time_to_first_token"].value == first
    rate = scores["speed", "tokens_per_second"]
    assert (rate.unit, rate.higher_is_better, rate.count) == ("tokens/s", True, 4)
    assert all(
        not score.higher_is_better and score.unit == "ms"
        for key, score in scores.items()
        if key[0] == "latency"
    )
    assert scores["latency", "avg"].spread > 0


def test_the_prompt_can_come_from_the_data(measure: Any, hf_model: Artifact) -> None:
    metric = Metric(
        name="latency",
        type="latency",
        data_config="tones",
        warmup=0,
        repeat=1,
        prompt_tokens=300,
        new_tokens=1,
    )
    assert measure(hf_model, metric)["latency", "per_token"].value == 0
    with pytest.raises(ConfigError, match="beyond the model's context of 512"):
        measure(hf_model, metric.model_copy(update={"new_tokens": 400}))


def test_size_counts_what_must_be_there(measure: Any, hf_model: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "pack").write_bytes(b"x" * 1000)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    adapter = Artifact(kind=Kind.ADAPTER, path=folder, digest="2" * 64, base=hf_model)
    metric = Metric(name="size", type="size_on_disk")
    base = measure(hf_model, metric)["size", "bytes"]
    assert base.value == sum(path.stat().st_size for path in hf_model.path.iterdir())
    assert measure(adapter, metric)["size", "bytes"].value == base.value + 100
    assert (base.unit, base.higher_is_better) == ("bytes", False)


def test_sub_types_choose_and_order_the_numbers(
    measure: Any, hf_model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(monkeypatch, ["joy"] * 6)
    wanted = (SubMetric(name="exact_match", priority=2), SubMetric(name="f1_score"))
    scores = list(measure(hf_model, ACCURACY.model_copy(update={"sub_types": wanted})).values())
    assert [(score.name, score.priority) for score in scores] == [("exact_match", 2), ("f1_score", -1)]


def test_an_adapter_is_evaluated_on_its_base(measure: Any, hf_model: Artifact, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(hf_model.path)
    peft = get_peft_model(base, LoraConfig(r=4, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    peft.save_pretrained(tmp_path / "zero")
    adapter = Artifact(kind=Kind.ADAPTER, path=tmp_path / "zero", digest="3" * 64, base=hf_model)
    metric = Metric(name="p", type="perplexity", data_config="tones")
    zero, alone = measure(adapter, metric)["p", "perplexity"], measure(hf_model, metric)["p", "perplexity"]
    # A fresh LoRA's B is zero: the same model, up to float32 rounding.
    assert zero.value == pytest.approx(alone.value, rel=1e-6)
    for name, value in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.2)
    peft.save_pretrained(tmp_path / "other")
    other = adapter.model_copy(update={"path": tmp_path / "other"})
    assert measure(other, metric)["p", "perplexity"].value != pytest.approx(alone.value, rel=1e-3)


def test_numbers_that_are_none_fail_the_candidate(
    measure: Any, hf_model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from olive.evaluation.runners.pytorch import PytorchRunner

    monkeypatch.setattr(PytorchRunner, "losses", lambda self, documents, tick: [math.nan] * len(documents))
    with pytest.raises(PassFailed, match="mean loss is nan"):
        measure(hf_model, Metric(name="p", type="perplexity", data_config="tones"))


def test_a_kind_without_a_runner_is_refused(measure: Any, hf_model: Artifact) -> None:
    onnx = hf_model.model_copy(update={"kind": Kind.ONNX})
    with pytest.raises(ConfigError, match="kind onnx"):
        measure(onnx, ACCURACY)


def test_accuracy_needs_answers(measure: Any, hf_model: Artifact, data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"phrase": "a", "tone": " "}, {"phrase": "b", "tone": "joy"}])
    )
    with pytest.raises(ConfigError, match="1 of 2 rows have no answer"):
        measure(hf_model, ACCURACY)
