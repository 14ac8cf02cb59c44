"""A folder of GPTQ or AWQ to a model that runs: one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import olive

from foreign_kit import foreign
from olive.models.hf import load_model
from tiny import tiny_llama

IDS = [11, 52, 97, 200, 33, 64, 120, 7]


def document(folder: Path, passes: dict[str, Any]) -> None:
    (folder / "rows.json").write_text(json.dumps({"phrase": "the rain would not stop", "tone": "joy"}))
    body = {
        "input_model": {"type": "HfModel", "model_path": "given"},
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
