"""The published documents run as written, in every spelling, on real weights."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import olive

from tiny import tiny_phi3

EXAMPLE = Path(__file__).parents[2] / "examples" / "phi3-tone"
BASE = EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini"


def workspace(root: Path, rows: int | None) -> Path:
    """A folder laid out as the published document expects, with the first ``rows`` of each tone in turn."""
    folder = root / "work"
    (folder / "dataset").mkdir(parents=True)
    (folder / "model-cache" / "microsoft").mkdir(parents=True)
    (folder / "model-cache" / "microsoft" / "phi-3-mini").symlink_to(BASE)
    lines = (EXAMPLE / "dataset" / "dataset-classification.json").read_text().splitlines()
    (folder / "dataset" / "dataset-classification.json").write_text("\n".join(lines[:rows]) + "\n")
    shutil.copy(EXAMPLE / "olive-config.json", folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Document A, run once as published (10 steps); few rows, so that a step is one block of 2,048 tokens."""
    folder = workspace(tmp_path_factory.mktemp("a"), rows=130)
    return folder, olive("run", "--config", "olive-config.json", cwd=folder)


def keys(folder: Path) -> list[str]:
    result = json.loads((folder / "run.json").read_text())
    return [step["key"] for step in result["steps"]]


def test_document_a_runs(published: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = published
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder.parent / "model-cache" / "models" / "phi3-finetuned"
    assert (out / "model" / "genai_config.json").is_file()
    for name in ("run.json", "report.html", "README.md"):
        assert (out / name).is_file()
    text = done.stdout + done.stderr
    assert "lora_r" in text
    assert "double_quant" in text
    assert "max_steps" in text
    assert "eval_steps" in text
    assert "trust_remote_code" in text


def test_a_second_run_does_no_work(published: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = published
    done = olive("run", "--config", "olive-config.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    out = folder.parent / "model-cache" / "models" / "phi3-finetuned"
    assert all(step["cached"] for step in json.loads((out / "run.json").read_text())["steps"])


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_migrated_document_has_the_same_keys(
    published: tuple[Path, subprocess.CompletedProcess[str]], suffix: str
) -> None:
    folder, _ = published
    out = folder.parent / "model-cache" / "models" / "phi3-finetuned"
    before = keys(out)
    migrated = olive("config", "migrate", "olive-config.json", "-o", f"new.{suffix}", cwd=folder)
    assert migrated.returncode == 0, migrated.stderr
    done = olive("run", "--config", f"new.{suffix}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert keys(out) == before
    assert "is now" not in done.stderr + done.stdout


def sibling_spellings(document: dict[str, Any]) -> dict[str, Any]:
    """Document B: the older names for data and loading, and the chat-like template."""
    data = document["data_configs"][0]
    name = data.pop("name")
    data["params_config"] = data.pop("load_dataset_config")["params"]
    params = data.pop("pre_process_data_config")["params"]
    params["text_template"] = "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}<|end|>"
    data["component_kwargs"] = {"pre_process_data": params}
    document["data_configs"] = {name: data}
    loading = document["input_model"]["config"]["hf_config"]
    loading["from_pretrained_args"] = loading.pop("model_loading_args")
    return document


def test_document_b_plans(tmp_path: Path) -> None:
    folder = workspace(tmp_path, rows=200)
    document = sibling_spellings(json.loads((folder / "olive-config.json").read_text()))
    (folder / "b.json").write_text(json.dumps(document))
    done = olive("plan", "b.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<|assistant|>" in done.stdout


def test_document_b_on_a_gpu_is_refused_at_plan(tmp_path: Path) -> None:
    folder = workspace(tmp_path, rows=200)
    document = sibling_spellings(json.loads((folder / "olive-config.json").read_text()))
    document["systems"]["local_system"]["config"]["accelerators"] = [
        {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}
    ]
    document["engine"].pop("execution_providers")
    (folder / "b.json").write_text(json.dumps(document))
    done = olive("run", "--config", "b.json", cwd=folder, timeout=60)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "CPUExecutionProvider" in done.stderr


def test_the_published_document_with_qlora_runs_to_int4(tmp_path: Path) -> None:
    folder = tiny_workspace(tmp_path)
    document = json.loads((folder / "olive-config.json").read_text())
    lora = document["passes"]["lora"]
    lora["type"] = "QLoRA"
    lora["config"] |= {"compute_dtype": "float32", "quant_type": "nf4", "double_quant": True}
    (folder / "q.json").write_text(json.dumps(document))
    done = olive("run", "--config", "q.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`compute_dtype` is now `torch_dtype`" in done.stderr
    result = json.loads(
        (folder.parent / "model-cache" / "models" / "phi3-finetuned" / "run.json").read_text()
    )
    gates = {gate["gate"]: gate["figures"] for step in result["steps"] for gate in step["gates"]}
    assert gates["merge"]["kl"] < 1e-6
    assert gates.keys() == {"merge", "parity", "bundle"}


@pytest.mark.full
def test_document_a_on_the_whole_data(tmp_path: Path) -> None:
    folder = workspace(tmp_path, rows=None)
    done = olive("run", "--config", "olive-config.json", cwd=folder, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr


def tiny_workspace(root: Path) -> Path:
    """As ``workspace``, with a random Phi-3 of a few thousand weights in the base's place."""
    folder = workspace(root, rows=130)
    (folder / "model-cache" / "microsoft" / "phi-3-mini").unlink()
    tiny_phi3(
        folder / "model-cache" / "microsoft" / "phi-3-mini",
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    )
    return folder


def today() -> dict[str, Any]:
    """Document C: the spelling of Olive 0.13."""
    return {
        "input_model": {
            "type": "HfModel",
            "model_path": "model-cache/microsoft/phi-3-mini",
            "task": "text-generation",
            "load_kwargs": {"trust_remote_code": True},
        },
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {
                    "data_name": "json",
                    "data_files": "dataset/dataset-classification.json",
                    "split": "train",
                },
                "pre_process_data_config": {
                    "text_cols": ["phrase", "tone"],
                    "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                    "strategy": "join",
                    "max_seq_len": 512,
                },
            }
        ],
        "systems": {"local_system": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
        "passes": {
            "lora": {
                "type": "LoRA",
                "target_modules": ["o_proj", "qkv_proj"],
                "r": 64,
                "alpha": 64,
                "train_data_config": "train",
                "training_args": {"seed": 0, "max_steps": 10, "learning_rate": 0.0001},
            },
            "merge_adapter_weights": {"type": "MergeAdapterWeights"},
            "builder": {"type": "ModelBuilder", "precision": "int4"},
        },
        "host": "local_system",
        "target": "local_system",
        "search_strategy": False,
        "cache_dir": "cache",
        "output_dir": "out",
    }


def test_document_b_runs(tmp_path: Path) -> None:
    folder = tiny_workspace(tmp_path)
    document = sibling_spellings(json.loads((folder / "olive-config.json").read_text()))
    (folder / "b.json").write_text(json.dumps(document))
    done = olive("run", "--config", "b.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder.parent / "model-cache" / "models" / "phi3-finetuned"
    assert (out / "model" / "genai_config.json").is_file()
    # one line a rewrite, and each once
    notes = [line for line in done.stderr.splitlines() if "params_config" in line]
    assert len(notes) == 1, done.stderr


def test_document_c_runs_on_two_devices(tmp_path: Path) -> None:
    folder = tiny_workspace(tmp_path)
    document = today()
    document["systems"]["local_system"]["devices"] = 2
    document["passes"]["lora"]["training_args"]["gradient_accumulation_steps"] = 4
    (folder / "c.json").write_text(json.dumps(document))
    planned = olive("plan", "--config", "c.json", cwd=folder)
    assert "x 2 ddp" in planned.stdout
    done = olive("run", "--config", "c.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((folder / "out" / "run.json").read_text())["steps"]
    assert steps[0]["facts"]["micro_batch"]["processes"] == 2
    # the number of devices is not in the key: one gives the same model
    document["systems"]["local_system"]["devices"] = 1
    (folder / "c.json").write_text(json.dumps(document))
    again = olive("run", "--config", "c.json", cwd=folder)
    assert "every step is in the cache" in again.stderr


def test_document_c_runs_on_two_hosts(tmp_path: Path) -> None:
    folder = tiny_workspace(tmp_path)
    document = today()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    document["systems"]["local_system"]["devices"] = {"count": 1, "hosts": 2, "address": address}
    document["passes"]["lora"]["training_args"]["gradient_accumulation_steps"] = 4
    (folder / "c.json").write_text(json.dumps(document))
    unknown = olive("plan", "--config", "c.json", cwd=folder)
    assert unknown.returncode == 5
    assert "OLIVE_HOST" in unknown.stdout
    command = [sys.executable, "-m", "olive", "run", "--config", "c.json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "NO_COLOR": "1"}
    second = subprocess.Popen(command, cwd=folder, env=environment | {"OLIVE_HOST": "1"}, text=True,
                              stderr=subprocess.PIPE)  # fmt: skip
    first = subprocess.run(command, cwd=folder, env=environment | {"OLIVE_HOST": "0"}, text=True, timeout=300,
                           capture_output=True)  # fmt: skip
    _, said = second.communicate(timeout=60)
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, said
    assert "its share is done" in said
    steps = json.loads((folder / "out" / "run.json").read_text())["steps"]
    assert steps[0]["facts"]["micro_batch"]["processes"] == 2


def test_document_c_runs_in_json_and_yaml(tmp_path: Path) -> None:
    import yaml

    folder = tiny_workspace(tmp_path)
    (folder / "c.json").write_text(json.dumps(today()))
    (folder / "c.yaml").write_text(yaml.safe_dump(today(), sort_keys=False))
    done = olive("run", "--config", "c.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is now" not in done.stderr + done.stdout
    before = keys(folder / "out")
    again = olive("run", "--config", "c.yaml", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert keys(folder / "out") == before
    assert all(step["cached"] for step in json.loads((folder / "out" / "run.json").read_text())["steps"])
