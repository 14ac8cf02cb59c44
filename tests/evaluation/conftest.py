from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olive.config.workflow import Accelerator, DataConfig, Evaluator, LoadDataset, Metric, PreProcess
from olive.evaluation.evaluate import evaluate
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from tiny import tiny_phi3

ROWS = [
    {"phrase": "the rain would not stop", "tone": "sadness"},
    {"phrase": "we won the match and danced in the street", "tone": "joy"},
    {"phrase": "something moved", "tone": "fear"},
    {"phrase": "nobody told me the whole family would be there", "tone": "surprise"},
    {"phrase": "I missed you all day", "tone": "sadness"},
    {"phrase": "the door, and I could not breathe", "tone": "fear"},
]
TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"


class Quiet:
    def start(self, task: str, total: int | None = None) -> None: ...
    def update(self, done: int, **fields: float | str) -> None: ...
    def finish(self) -> None: ...
    def note(self, message: str) -> None: ...


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough that the next token depends on the whole prompt and on positions."""
    folder = tmp_path_factory.mktemp("tiny") / "hf"
    return tiny_phi3(folder, tie_word_embeddings=False, initializer_range=0.3)


@pytest.fixture(scope="session")
def genai_folder(hf_folder: Path) -> Path:
    out = hf_folder.parent / "genai"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", hf_folder, "-o", out]
    command += ["-p", "fp32", "-e", "cpu", "-c", hf_folder.parent / "cache"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def hf_model(hf_folder: Path) -> Artifact:
    return Artifact(kind=Kind.HF, path=hf_folder, digest="0" * 64)


@pytest.fixture(scope="session")
def genai_model(genai_folder: Path) -> Artifact:
    return Artifact(kind=Kind.GENAI, path=genai_folder, digest="1" * 64)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return DataConfig(
        name="tones",
        load_dataset_config=LoadDataset(data_name="json", data_files="rows.json", split="train"),
        pre_process_data_config=PreProcess(text_template=TEMPLATE, strategy="line-by-line"),
    )


@pytest.fixture
def measure(tmp_path: Path, data: DataConfig) -> Any:
    def run(model: Artifact, *metrics: Metric, config: DataConfig = data) -> dict[tuple[str, str], Any]:
        scores = evaluate(
            model,
            Evaluator(metrics=metrics),
            data={config.name: config},
            base_dir=tmp_path,
            machine=probe(),
            accelerator=Accelerator(),
            progress=Quiet(),
        )
        return {(score.metric, score.name): score for score in scores}

    return run
