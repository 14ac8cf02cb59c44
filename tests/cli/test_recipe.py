"""The document that is inferred from a model and a dataset."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from recipe_kit import LABELS, conversations, errors, lines, metric, pre, preferences, recipe, splits, tones

import tiny
from olive.cli.main import entry
from olive.errors import ConfigError
from olive.workflows import plan
from olive.workflows.recipe import METHODS, Request, finetune


def test_two_columns_become_a_template_with_labels(work: Path) -> None:
    found = recipe(lines("tones.jsonl", tones(160)))
    assert pre(found) == {
        "text_template": "### Phrase: {phrase}\n### Tone:\n{tone}",
        "train_on": "completion",
        "strategy": "pack",
        "max_seq_len": 512,
    }
    assert splits(found) == ["train[:-16]", "train[-16:]"]
    measured = metric(found)
    assert measured is not None
    assert (measured["type"], measured["labels"]) == ("accuracy", list(LABELS))
    steps = found.document["passes"]
    assert [step["type"] for step in steps.values()] == ["LoRA", "MergeAdapterWeights", "ModelBuilder"]
    assert steps["finetune"]["training_args"]["num_train_epochs"] == 3
    assert steps["export"] == {
        "type": "ModelBuilder",
        "precision": "int4",
        "algo_config": "k_quant_mixed",
        "block_size": 16,
    }
    assert "output_dir" not in found.document
    assert "systems" not in found.document


def test_a_sorted_file_is_held_out_all_over(work: Path) -> None:
    found = recipe(lines("tones.jsonl", sorted(tones(200), key=lambda row: str(row["tone"]))))
    train, held_out = splits(found)
    assert held_out.count("+") == 9
    planned = plan(found.document)
    rows = {name: shown.rows for name, shown in planned.previews.items()}
    assert rows == {"train": 180, "held_out": 20}
    assert train.startswith("train[0:18]+train[20:38]+")
    assert any("not in random order" in reason for _, reason in found.reasons)


def test_rows_that_repeat_are_split_by_the_pass(work: Path) -> None:
    found = recipe(lines("tones.jsonl", tones(40) * 3))
    assert splits(found) == ["train"]
    assert found.document["passes"]["finetune"]["eval_dataset_size"] == 12
    assert metric(found) is None
    assert errors(found) == []


def test_few_rows_are_all_trained_on(work: Path) -> None:
    found = recipe(lines("tones.jsonl", tones(19)))
    assert splits(found) == ["train"]
    args = found.document["passes"]["finetune"]["training_args"]
    assert "eval_strategy" not in args
    assert metric(found) is None


def test_a_csv_with_numbering_and_free_answers(work: Path) -> None:
    with Path("faq.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "answer", "question"])
        writer.writerows([index, f"it is {index * 7}", f"what is {index}?"] for index in range(40))
    found = recipe("faq.csv")
    assert pre(found)["text_template"] == "### Question: {question}\n### Answer:\n{answer}"
    assert found.document["data_configs"][0]["load_dataset_config"]["data_name"] == "csv"
    measured = metric(found)
    assert measured is not None
    assert measured["type"] == "perplexity"


def test_instruction_input_output(work: Path) -> None:
    rows = [{"instruction": f"add {n}", "input": "", "output": f"{n}."} for n in range(30)]
    found = recipe(lines("alpaca.json", rows))
    assert pre(found)["text_template"] == (
        "### Instruction: {instruction}\n### Input: {input}\n### Output:\n{output}"
    )
    found = recipe("alpaca.json", model="chat")
    assert pre(found)["format"] == "alpaca"
    assert errors(found) == []


def test_a_number_may_be_the_answer(work: Path) -> None:
    rows = [{"text": f"review {n} of the film", "label": n % 2} for n in range(40)]
    found = recipe(lines("reviews.jsonl", rows))
    assert pre(found)["text_template"] == "### Text: {text}\n### Label:\n{label}"
    measured = metric(found)
    assert measured is not None
    assert measured["labels"] == ["0", "1"]


def test_one_column_of_text(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"story": f"once upon a time there were {n} bears " * 30, "pages": n} for n in range(30)]
    lines("stories.json", rows)
    assert entry(["finetune", "-m", "model", "-d", "stories.json", "--dry-run"]) == 0
    assert "story is the only column of text" in capsys.readouterr().err
    found = recipe("stories.json")
    assert pre(found)["text_cols"] == ["story"]
    assert "train_on" not in pre(found)
    measured = metric(found)
    assert measured is not None
    assert measured["type"] == "perplexity"


def test_messages_take_the_models_chat_template(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("chat.jsonl", conversations(40))
    command = ["finetune", "-m", "chat", "-d", "chat.jsonl", "--precision", "none", "--max-steps", "1"]
    assert entry(command) == 0
    assert "the data holds conversations; rendered with the model's chat template" in capsys.readouterr().err
    found = recipe("chat.jsonl", model="chat")
    chat = {"format": "messages", "chat_template": True}
    assert pre(found) == chat | {"strategy": "pack", "max_seq_len": 512}
    measured = metric(found)
    assert measured is not None
    assert measured["labels"] == ["no", "yes"]


def test_conversations_without_a_chat_template(work: Path) -> None:
    found = recipe(lines("chat.jsonl", conversations(40)))
    assert pre(found)["format"] == "messages"
    assert errors(found) == []
    assert any("the model has no chat template" in reason for _, reason in found.reasons)


def test_conversations_of_other_forms(work: Path) -> None:
    rows = conversations(40)
    other = [{"dialogue": row["messages"], "source": "web"} for row in rows]
    found = recipe(lines("dialogue.jsonl", other), model="chat")
    assert (pre(found)["format"], pre(found)["message_col"]) == ("messages", "dialogue")
    assert errors(found) == []
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in row["messages"]]}
        for row in rows
    ]
    found = recipe(lines("shared.jsonl", shared), model="chat")
    assert pre(found)["format"] == "sharegpt"
    assert errors(found) == []


def test_a_folder_with_a_validation_part(work: Path) -> None:
    lines("data/train-0.jsonl", tones(30))
    lines("data/train-1.jsonl", tones(60)[30:])
    lines("data/validation.jsonl", tones(90)[60:])
    Path("data/README.md").write_text("a card", encoding="utf-8")
    found = recipe("data")
    assert splits(found) == ["train", "validation"]
    rows = {name: shown.rows for name, shown in plan(found.document).previews.items()}
    assert rows == {"train": 60, "held_out": 30}


def test_evaluation_data_of_its_own(work: Path) -> None:
    found = recipe(lines("a.jsonl", tones(20)), eval_data=lines("b.jsonl", tones(40)[20:]))
    assert splits(found) == ["train", "train"]
    assert found.document["data_configs"][1]["load_dataset_config"]["data_files"] == "b.jsonl"
    measured = metric(found)
    assert measured is not None
    assert measured["data_config"] == "held_out"


def test_a_dataset_of_the_hub_by_its_template(work: Path) -> None:
    found = recipe("someone/tones", template="{phrase}: {tone}", eval_size=0.2)
    assert splits(found) == ["train[:80%]", "train[80%:]"]
    assert pre(found)["max_seq_len"] == 512
    assert errors(found) == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_plans(work: Path, method: str) -> None:
    pairs = METHODS[method].pairs
    found = recipe(lines("rows.jsonl", preferences() if pairs else tones()), method=method)
    assert errors(found) == []
    passes = found.document["passes"]
    assert passes["finetune"]["type"] == METHODS[method].type
    assert list(passes) == (["finetune", "export"] if method == "full" else ["finetune", "merge", "export"])
    usual = 2e-5 if method == "full" else 1e-5 if pairs else 2e-4
    assert passes["finetune"]["training_args"]["learning_rate"] == usual
    assert ("r" in passes["finetune"]) == (method != "full")


def test_what_is_given_is_taken(work: Path) -> None:
    found = recipe(
        lines("tones.jsonl", tones(200)),
        text_cols=("phrase", "tone"),
        r=8,
        max_steps=7,
        learning_rate=1e-3,
        max_seq_len=64,
        seed=3,
        eval_size=10,
        output_dir="there",
        precision="int8",
    )
    step = found.document["passes"]["finetune"]
    assert (step["r"], step["alpha"]) == (8, 16)
    assert step["training_args"] == {
        "seed": 3,
        "max_steps": 7,
        "learning_rate": 1e-3,
        "logging_steps": 0.05,
        "eval_strategy": "epoch",
    }
    assert splits(found) == ["train[:-10]", "train[-10:]"]
    assert pre(found)["max_seq_len"] == 64
    assert found.document["output_dir"] == "there"
    assert found.document["passes"]["export"] == {"type": "ModelBuilder", "precision": "int8"}


def test_widths_of_an_odd_number_of_blocks_are_taken_as_they_are(work: Path) -> None:
    tiny.tiny_phi3(work / "odd", hidden=96, intermediate_size=208)
    step = recipe(lines("tones.jsonl", tones()), model="odd").document["passes"]["export"]
    assert (step["algo_config"], step["block_size"]) == ("k_quant_mixed", 16)


def test_a_gpu_is_taken_where_it_is_usable(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.hardware.machine import Gpu
    from olive.hardware.probe import probe

    lines("tones.jsonl", tones())
    with_gpu = probe().model_copy(update={"gpus": (Gpu(name="a card", memory=1 << 34),)})
    monkeypatch.setattr("olive.workflows.recipe.probe", lambda: with_gpu)
    assert "systems" not in finetune(Request("model", "tones.jsonl")).document
    trained = finetune(Request("model", "tones.jsonl", precision="none")).document
    assert trained["systems"]["local_system"]["accelerators"] == [{"device": "gpu"}]


def test_preferences_are_split_by_prompt_and_measured_by_training(work: Path) -> None:
    found = recipe(lines("pairs.jsonl", preferences()), method="dpo")
    assert pre(found) == {"format": "preference", "max_seq_len": 512}
    step = found.document["passes"]["finetune"]
    assert (step["type"], step["eval_dataset_size"]) == ("DPO", 4)
    assert step["training_args"]["eval_strategy"] == "epoch"
    assert metric(found) is None
    (shown,) = plan(found.document).previews.values()
    assert (shown.blocks, shown.eval_blocks, shown.rejected) == (36, 4, "I could not say")


def test_other_methods_learn_the_chosen_answers(work: Path) -> None:
    found = recipe(lines("pairs.jsonl", preferences()))
    assert pre(found)["format"] == "preference"
    assert errors(found) == []


def test_dpo_without_preferences_says_which_columns_it_reads(work: Path) -> None:
    with pytest.raises(ConfigError, match="needs column 'chosen'"):
        recipe(lines("tones.jsonl", tones()), method="orpo")
