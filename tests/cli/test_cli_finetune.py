"""``olive finetune``: what it infers and refuses, that it runs as ``olive run`` does, what it imports."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from olive.cli import finetune as verb
from olive.cli import main
from olive.cli.main import entry
from olive.workflows import plan
from olive.workflows.recipe import METHODS, Recipe, Request, finetune

SOURCE = str(Path(main.__file__).parents[2])
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "datasets", "pandas", "numpy", "peft")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LABELS = ("fear", "joy", "sadness", "surprise")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models: ``plain``, and ``chat`` with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_phi3(folder / "plain")
    shutil.copytree(folder / "plain", folder / "chat")
    tiny.tiny_tokenizer(folder / "chat", chat_template=CHAT)
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(models / "plain", target_is_directory=True)
    (tmp_path / "chat").symlink_to(models / "chat", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tones(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"phrase": f"the {index}th day of rain and wind", "tone": LABELS[index % 4]} for index in range(count)
    ]


def lines(path: str, rows: list[dict[str, Any]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(data: str, model: str = "model", **settings: Any) -> Recipe:
    return finetune(Request(model=model, data=data, device="cpu", **settings))


def pre(found: Recipe) -> dict[str, Any]:
    settings: dict[str, Any] = found.document["data_configs"][0]["pre_process_data_config"]
    return settings


def splits(found: Recipe) -> list[str]:
    return [config["load_dataset_config"]["split"] for config in found.document["data_configs"]]


def errors(found: Recipe) -> list[str]:
    return [str(problem) for problem in plan(found.document).findings if problem.severity.value == "error"]


def metric(found: Recipe) -> dict[str, Any] | None:
    name = found.document.get("evaluator")
    return None if name is None else dict(found.document["evaluators"][name]["metrics"][0])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_from_nothing_to_a_model(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("tones.jsonl", tones())
    command = [
        "finetune",
        "-m",
        "model",
        "-d",
        "tones.jsonl",
        "--max-steps",
        "2",
        "--save-config",
        "doc.json",
    ]
    assert entry([*command, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "Ready: 3 of 3 steps to run." in shown.out
    assert not (work / "olive-output").exists()
    document = json.loads(Path("doc.json").read_text(encoding="utf-8"))
    assert shown.out.startswith(json.dumps(document, indent=2))
    assert "text_template, train_on: tone answers phrase" in shown.err
    planned, from_file = plan(document), plan("doc.json")
    assert planned.steps[0].key == from_file.steps[0].key is not None

    assert entry(command) == 0
    assert (work / "olive-output" / "model" / "genai_config.json").is_file()
    run = json.loads((work / "olive-output" / "run.json").read_text(encoding="utf-8"))
    assert [step["name"] for step in run["steps"]] == ["finetune", "merge", "export"]
    assert [score["name"] for score in run["input_scores"]][:1] == ["exact_match"]
    capsys.readouterr()

    assert [step.key for step in plan("doc.json").steps] == [step.key for step in plan(document).steps]
    assert all(step.cached for step in plan("doc.json").steps)
    assert entry(["run", "--config", "doc.json"]) == 0
    assert "every step is in the cache" in capsys.readouterr().err


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


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"please read {n} lines, quickly"},
                {"role": "assistant", "content": "yes" if n % 2 else "no"},
            ]
        }
        for n in range(count)
    ]


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
    found = recipe(lines("tones.jsonl", tones()), method=method)
    assert errors(found) == []
    passes = found.document["passes"]
    assert passes["finetune"]["type"] == METHODS[method].type
    assert list(passes) == (["finetune", "export"] if method == "full" else ["finetune", "merge", "export"])
    assert passes["finetune"]["training_args"]["learning_rate"] == (2e-5 if method == "full" else 2e-4)
    assert ("r" in passes["finetune"]) == (method != "full")


def test_the_command_line_knows_the_methods_of_the_recipe() -> None:
    assert tuple(METHODS) == verb.METHODS


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


@pytest.mark.parametrize(
    ("hidden", "inner", "chosen"),
    [(64, 176, ("k_quant_mixed", 32)), (96, 208, ("k_quant_mixed", 64)), (32, 48, ("rtn", 32))],
)
def test_block_size_follows_the_models_widths(
    work: Path, hidden: int, inner: int, chosen: tuple[str, int]
) -> None:
    tiny.tiny_phi3(work / "odd", hidden=hidden, intermediate_size=inner)
    step = recipe(lines("tones.jsonl", tones()), model="odd").document["passes"]["export"]
    assert (step["algo_config"], step["block_size"]) == chosen


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metod", "lora"], "olive finetune has no option --metod; did you mean --method?"),
        (["--method", "loar"], "'loar' is not known; did you mean lora?"),
        (["--epochs", "2", "--max-steps", "2"], "--epochs and --max-steps exclude each other"),
        (["--template", "{a}", "--text-cols", "a"], "--template and --text-cols exclude each other"),
        (["--eval-data", "b.jsonl", "--eval-size", "1"], "--eval-data and --eval-size exclude each other"),
        (["--method", "full", "--r", "8"], "--r is a setting of adapters"),
        (["--text-cols", "a,,b"], "has an empty name"),
        (["--lr", "0"], "'0' is not above 0"),
        (["--eval-size", "-1"], "--eval-size"),
        (["--seed", "1.5"], "'1.5' is no whole number from 0"),
        (["--eval-size", "40"], "nothing of 40 rows to train on"),
        (["--template", "{phrase} {tune}"], "'tune', which is no column of the data"),
        (["--text-cols", "phrase,mood"], "'mood', which is no column of the data"),
        (["--split", "test"], "has no split 'test'; it has train"),
        (["--eval-data", "none.jsonl"], "there is no file none.jsonl"),
        (["--save-config", "tones.jsonl"], "is there and is no workflow document"),
        (["--save-config", "no/such/doc.json"], "there is no folder no/such"),
    ],
)
def test_options_that_do_not_fit(
    work: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "model", "-d", "tones.jsonl", *arguments]) == 2
    assert told in said(capsys)
    assert not (work / "olive-output").exists()
    assert json.loads(Path("tones.jsonl").read_text(encoding="utf-8").splitlines()[0]) == tones()[0]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("none.jsonl", None, "there is no file none.jsonl"),
        ("empty.jsonl", "", "has no rows"),
        ("broken.json", '{"a": ', "broken.json:1"),
        ("notes.docx", "x", "notes.docx ends with .docx, which is no kind of data file"),
        ("plain", "x", "plain ends with no suffix"),
        ("head.csv", "text,label\n", "has no rows"),
        ("list.json", "[1, 2]", "is not an object"),
        ("numbers.json", '{"a": 1, "b": [2]}', "no column of text was found; the columns are a (number), b"),
        (
            "three.json",
            '{"a": "x", "b": "y", "c": "z"}',
            "--template '### A: {a}\\n### B: {b}\\n### C:\\n{c}'",
        ),
        ("which.json", '{"title": "x", "text": "y", "label": "z"}', "label is the answer, but to which"),
    ],
)
def test_data_that_does_not_do(
    work: Path, name: str, text: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path(name).write_text(text, encoding="utf-8")
    assert entry(["finetune", "-m", "model", "-d", name, "--dry-run"]) == 2
    assert told in said(capsys)


def test_a_near_name_is_suggested(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "model", "-d", "tonse.jsonl"]) == 2
    assert "did you mean tones.jsonl?" in said(capsys)


def test_folders_without_data(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines("mixed/a.jsonl", tones())
    Path("mixed/b.csv").write_text("a\n1\n", encoding="utf-8")
    assert entry(["finetune", "-m", "model", "-d", "mixed"]) == 2
    assert "folder mixed holds files of several kinds: a.jsonl, b.csv" in said(capsys)
    Path("bare").mkdir()
    assert entry(["finetune", "-m", "model", "-d", "bare"]) == 2
    assert "folder bare holds no data file: nothing" in said(capsys)


def test_a_hub_dataset_is_not_read_unasked(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["finetune", "-m", "model", "-d", "someone/tones"]) == 2
    assert "Add --download to read it now" in said(capsys)


def test_a_hub_dataset_is_read_when_asked(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def load_dataset(name: str, *_: object, **settings: Any) -> list[dict[str, Any]]:
        asked.append((name, settings["split"]))
        return tones(200)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    command = ["finetune", "-m", "model", "-d", "someone/tones", "--split", "part"]
    assert entry([*command, "--download", "--dry-run", "--save-config", "doc.json"]) == 0
    assert asked == [("someone/tones", "part")]
    loads = [
        config["load_dataset_config"] for config in json.loads(Path("doc.json").read_text())["data_configs"]
    ]
    assert loads == [
        {"data_name": "someone/tones", "split": "part[:-20]"},
        {"data_name": "someone/tones", "split": "part[-20:]"},
    ]


def test_a_null_is_told_with_its_row(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tones()
    rows[3]["tone"] = None
    lines("tones.jsonl", rows)
    assert entry(["finetune", "-m", "model", "-d", "tones.jsonl"]) == 2
    assert "column 'tone' is null or missing at --data: row 3" in said(capsys)


def test_models_that_do_not_do(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "hub"))
    lines("tones.jsonl", tones())
    assert entry(["finetune", "-m", "someone/none", "-d", "tones.jsonl"]) == 5
    assert "--download fetches it first" in said(capsys)
    assert entry(["finetune", "-m", "./none", "-d", "tones.jsonl"]) == 2
    assert "there is no folder './none'" in said(capsys)
    Path("adapter").mkdir()
    shutil.copy("model/model.safetensors", "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    assert entry(["finetune", "-m", "adapter", "-d", "tones.jsonl"]) == 2
    assert "adapter holds an adapter, which cannot be fine-tuned" in said(capsys)


def test_the_document_is_written_as_yaml_too(work: Path) -> None:
    lines("tones.jsonl", tones())
    command = ["finetune", "-m", "model", "-d", "tones.jsonl", "--dry-run", "--save-config"]
    assert entry([*command, "doc.yaml"]) == 0
    assert entry([*command, "doc.json"]) == 0
    assert entry([*command, "doc.json"]) == 0  # ours may be written again
    assert plan("doc.yaml").steps[0].key == plan("doc.json").steps[0].key


def test_a_gpu_is_taken_where_it_is_usable(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.hardware.machine import Gpu
    from olive.hardware.probe import probe

    lines("tones.jsonl", tones())
    with_gpu = probe().model_copy(update={"gpus": (Gpu(name="a card", memory=1 << 34),)})
    monkeypatch.setattr("olive.workflows.recipe.probe", lambda: with_gpu)
    assert "systems" not in finetune(Request("model", "tones.jsonl")).document
    trained = finetune(Request("model", "tones.jsonl", precision="none")).document
    assert trained["systems"]["local_system"]["accelerators"] == [{"device": "gpu"}]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": SOURCE}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def test_help_is_quick_and_light() -> None:
    code = (
        "import sys; from olive.cli.main import entry; entry(['finetune', '--help']);"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'pydantic', 'yaml', *sys.argv[1:]}))"
    )
    started = time.perf_counter()
    done = python(code, *HEAVY)
    took = time.perf_counter() - started
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert took < 2  # 0.1 s alone; the machine may be busy


def test_inference_imports_nothing_heavy(work: Path) -> None:
    lines("tones.jsonl", tones())
    code = (
        "import sys; from olive.cli.main import entry;"
        "code = entry(['finetune', '-m', 'model', '-d', 'tones.jsonl', '--dry-run']);"
        "print(code, [m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    )
    done = python(code, *HEAVY)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
