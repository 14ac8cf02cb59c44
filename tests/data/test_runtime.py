"""What ONNX Runtime GenAI reads against what training reads, on the real library."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_tokens import edit, metaspace

from olive.config.workflow import DataConfig
from olive.data.plan import preview
from olive.data.runtime import Question
from olive.data.tokens import load
from olive.errors import Severity
from tiny import tiny_tokenizer

pytest.importorskip("onnxruntime_genai")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TURNS = [{"role": "user", "content": "What is 漢字 🙂?\n 12345"}]


def asked(folder: Path, text: str, ids: list[int] | None = None, **more: Any) -> list[str]:
    prompt = more.pop("prompt", None)
    with Question(folder, text, **more) as question:
        found = question.problems(load(folder).encode(text) if ids is None else ids, prompt)
    return [f"{problem.severity}: {problem.message}" for problem in found]


def test_a_usual_tokenizer_reads_the_same(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path, chat_template=CHAT)
    chat = load(folder).chat
    assert chat is not None
    prompt = chat.render(TURNS, add_generation_prompt=True)
    assert asked(folder, prompt, template=CHAT, turns=TURNS, prompt=prompt) == []


def test_what_differs_is_an_error(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path, chat_template=CHAT)
    ids = load(folder).encode("the rain")
    (found,) = asked(folder, "the rain", [*ids[:1], 7, *ids[2:]])
    assert found.startswith("error: ONNX Runtime GenAI reads the first row otherwise")
    assert "from token 1 on" in found
    (found,) = asked(folder, "the rain", template=CHAT, turns=TURNS, prompt="<|user|>\nother")
    assert "renders the chat template otherwise" in found


def test_a_tokenizer_that_the_runtime_reads_in_its_own_way(tmp_path: Path) -> None:
    (found,) = asked(metaspace(tmp_path), "the rain is joy")
    assert found.startswith("error: ")


def test_what_the_runtime_cannot_read_is_a_warning(tmp_path: Path) -> None:
    folder = edit(tiny_tokenizer(tmp_path), tokenizer_class="NoSuchTokenizer")
    (found,) = asked(folder, "the rain")
    assert found.startswith("warning: ONNX Runtime GenAI does not read this tokenizer")
    folder = tiny_tokenizer(tmp_path / "other")
    (found,) = asked(folder, "the rain", template="{% nonsense %}", turns=TURNS, prompt="x")
    assert found.startswith("warning: ONNX Runtime GenAI does not render")


def test_nothing_is_asked_of_a_folder_without_the_file(tmp_path: Path) -> None:
    with Question(None, "x") as nothing, Question(tmp_path, "x") as empty:
        assert nothing.problems([1]) == empty.problems([1]) == []


@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_plan_asks_when_told_to(tmp_path: Path, form: str) -> None:
    metaspace(tmp_path)
    edit(tmp_path, chat_template=CHAT)
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "the rain is", "completion": "joy and joy"}]))
    pre = {"strategy": "pack"} | ({} if form == "chat" else {"text_template": "{prompt} {completion}"})
    config = DataConfig.model_validate(
        {
            "name": "d",
            "load_dataset_config": {"data_name": "json", "split": "train", "data_files": "a.json"},
            "pre_process_data_config": pre,
        }
    )
    assert preview(config, tmp_path, tmp_path).problems == ()
    began = time.perf_counter()
    found = preview(config, tmp_path, tmp_path, runtime=True).problems
    assert time.perf_counter() - began < 10
    assert [problem.severity for problem in found] == [Severity.ERROR]
    assert found[0].where == "data_configs[d]"
