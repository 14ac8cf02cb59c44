"""A folder of GPTQ or AWQ to a model that runs: one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import olive

from foreign_kit import bitsandbytes_folder, foreign, gguf_file
from olive.models.hf import load_model
from tiny import tiny_llama

IDS = [11, 52, 97, 200, 33, 64, 120, 7]


def document(folder: Path, passes: dict[str, Any], model: str = "given") -> None:
    rows = [json.dumps({"phrase": f"the rain would not stop {day}", "tone": "joy"}) for day in range(40)]
    (folder / "rows.json").write_text("\n".join(rows))
    body = {
        "input_model": {"type": "HfModel", "model_path": model},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "rows.json", "split": "train"},
                "pre_process_data_config": {"text_template": "{phrase} {tone}", "max_seq_len": 64},
            }
        ],
        "passes": passes,
        "cache_dir": "cache",
        "output_dir": "out",
    }
    (folder / "document.json").write_text(json.dumps(body))


def last_logits(folder: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits after ``IDS``, and eight tokens generated, by ONNX Runtime GenAI."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(IDS) + 8, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(IDS)
    logits = torch.from_numpy(generator.get_logits().copy()).reshape(-1)[-model_vocabulary(folder) :]
    while not generator.is_done():
        generator.generate_next_token()
    return logits, [int(token) for token in generator.get_sequence(0)[len(IDS) :]]


def model_vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"])


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_the_exported_model_computes_what_the_file_says(tmp_path: Path, kind: str) -> None:
    """With activations in float32 the logits differ by rounding alone: 1e-4 of their spread."""
    plain = tiny_llama(tmp_path / "plain", tie_word_embeddings=False, initializer_range=0.2)
    foreign(plain, tmp_path / "given", kind)
    # the head stays in float: the builder would round it by its own method otherwise
    export = {"type": "ModelBuilder", "precision": "int4", "accuracy_level": 1}
    document(tmp_path, {"export": export | {"nodes_to_exclude": ["/lm_head/MatMul"]}})
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    figures = {gate["gate"]: gate["figures"] for gate in steps[0]["gates"]}
    assert figures["parity"]["kl"] < 1e-6
    logits, answer = last_logits(tmp_path / "out" / "model")
    model = load_model(tmp_path / "given", dtype="float32")
    with torch.no_grad():
        wanted = model(torch.tensor([IDS])).logits[0, -1]
    assert float((logits - wanted).abs().max()) < 1e-4 * float(wanted.std())
    said = model.generate(torch.tensor([IDS]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert answer == said[0, len(IDS) : len(IDS) + len(answer)].tolist()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ({"l": {"type": "LoRA", "train_data_config": "train"}}, "the input model is stored as integers"),
        ({"k": {"type": "KQuant"}}, "stored quantised"),
        ({"e": {"type": "ModelBuilder", "precision": "fp32"}}, "precision fp32 would undo"),
    ],
)
def test_what_needs_floats_is_refused_at_plan(tmp_path: Path, passes: dict[str, Any], message: str) -> None:
    foreign(tiny_llama(tmp_path / "plain", tie_word_embeddings=False), tmp_path / "given", "gptq")
    document(tmp_path, passes)
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert message in " ".join((planned.stdout + planned.stderr).split())


def test_an_adapter_on_weights_of_bitsandbytes(tmp_path: Path) -> None:
    """They are expanded, trained on, merged into and exported."""
    plain = tiny_llama(tmp_path / "plain", initializer_range=0.2)
    bitsandbytes_folder(plain, tmp_path / "given", "nf4", double=True)
    settings = {"max_steps": 2, "seed": 0}
    lora = {"type": "LoRA", "r": 4, "train_data_config": "train", "training_args": settings}
    export = {"type": "ModelBuilder", "precision": "fp32"}
    document(tmp_path, {"lora": lora, "merge": {"type": "MergeAdapterWeights"}, "export": export})
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert "no uniform grid" in " ".join(planned.stdout.split())
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()


def test_from_one_file_to_another(tmp_path: Path) -> None:
    """GGUF in, our integers, GGUF out: every gate holds, and a second run takes all from the cache."""
    plain = tiny_llama(tmp_path / "plain", hidden=256, layers=1, initializer_range=0.2)
    gguf_file(plain, tmp_path / "model.gguf", "Q4_K")
    document(tmp_path, {"k": {"type": "KQuant"}, "save": {"type": "SaveGguf"}}, "model.gguf")
    done = olive("run", "--config", "document.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "model" / "model.gguf").is_file()
    steps = json.loads((tmp_path / "out" / "run.json").read_text())["steps"]
    assert [gate["gate"] for gate in steps[1]["gates"]] == ["integers", "parity"]
    again = olive("run", "--config", "document.json", cwd=tmp_path)
    assert again.returncode == 0
    assert all(step["cached"] for step in json.loads((tmp_path / "out" / "run.json").read_text())["steps"])


def test_what_saving_needs_is_told_at_plan(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "given")
    document(tmp_path, {"save": {"type": "SaveQuantized", "format": "gptq"}})
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert "takes a model of integers" in " ".join((planned.stdout + planned.stderr).split())
    quantise = {"type": "KQuant", "bits": 8}
    document(tmp_path, {"k": quantise, "save": {"type": "SaveQuantized", "format": "awq"}})
    planned = olive("plan", "--config", "document.json", cwd=tmp_path)
    assert planned.returncode == 2
    assert "awq stores 4 bits" in " ".join((planned.stdout + planned.stderr).split())
