"""The same 10-step work, whole process: ours against Olive 0.13.0, installed beside us.

    python benchmarks/against_olive.py [--runs 1] [--defaults]

Both sides fine-tune the example's base on the same 40 rows, one row a micro-batch, 4 micro-batches a step,
10 steps, float32, merge, and export int4. Olive's document is hand-ported and hand-tuned (float32, unpadded).
Ours runs its gates too. `--defaults` also times one training step of Olive with its own defaults (bfloat16,
every row padded to 1,024 tokens) beside one of ours. Prints wall seconds, peak memory of the process, and the
ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "phi3-tone"
BASE = EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini"
VENV = ROOT / ".venv-olive"
THEIRS = (
    "olive-ai==0.13.0", "onnxruntime-genai==0.13.2", "onnxruntime", "peft", "transformers<5", "datasets",
    "accelerate", "onnx", "onnxscript", "bitsandbytes", "torchmetrics", "pydantic<2.13",
)  # fmt: skip
ROWS = 40
TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"


def environment() -> Path:
    """A second virtual environment with Olive 0.13.0; made once."""
    python = VENV / "bin" / "python"
    if not (VENV / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *THEIRS], check=True)
        (VENV / ".ready").touch()
    return python


def document(folder: Path, *, theirs: bool, steps: int = 10, padded: bool = False) -> dict[str, Any]:
    """The work in today's spelling, which both understand."""
    pre: dict[str, Any] = {"text_template": TEMPLATE, "strategy": "line-by-line", "max_seq_len": 1024}
    lora: dict[str, Any] = {
        "type": "LoRA", "target_modules": ["o_proj", "qkv_proj"], "r": 64, "alpha": 64, "lora_dropout": 0.1,
        "train_data_config": "train",
        "training_args": {
            "seed": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
            "gradient_checkpointing": False, "learning_rate": 1e-4, "max_steps": steps, "logging_steps": 10,
        },
    }  # fmt: skip
    if theirs:
        pre["pad_to_max_len"] = padded
        if not padded:
            lora["torch_dtype"] = "float32"
        lora["training_args"]["use_cpu"] = True
    return {
        "input_model": {"type": "HfModel", "model_path": str(BASE), "task": "text-generation"},
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {
                    "data_name": "json",
                    "data_files": str(folder / "rows.json"),
                    "split": "train",
                },
                "pre_process_data_config": pre,
            }
        ],
        "systems": {
            "local_system": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "passes": {
            "lora": lora,
            "merge": {"type": "MergeAdapterWeights"},
            "builder": {"type": "ModelBuilder", "precision": "int4"},
        },
        "host": "local_system",
        "target": "local_system",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }


QUIET = {"HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Took:
    """One whole process.

    Attributes:
        seconds: wall time.
        memory: peak resident GiB.
        code: exit code.
        step: seconds a training step, from what the run reports; nan when it reports none.
    """

    seconds: float
    memory: float
    code: int
    step: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.seconds:.1f} s, {self.memory:.2f} GiB, {self.step:.2f} s a step (exit {self.code})"


def timed(command: list[str], folder: Path) -> Took:
    """Run ``command`` in ``folder``."""
    log = folder / "log.txt"
    started = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=os.environ | QUIET
        )
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    code = os.waitstatus_to_exitcode(status)
    if code:
        print(log.read_text()[-2000:], file=sys.stderr)
    return Took(seconds, usage.ru_maxrss / 2**20, code, step_seconds(folder, log.read_text()))


def step_seconds(folder: Path, log: str) -> float:
    """Training seconds a step: Olive's log prints transformers' metrics, our run.json keeps them."""
    ours = folder / "out" / "run.json"
    if ours.exists():
        facts = json.loads(ours.read_text())["steps"][0].get("facts", {})
        if "training_seconds" in facts:
            return float(facts["training_seconds"]) / int(facts["steps"])
    rate = re.search(r"'train_steps_per_second': '?([0-9.]+)", log)
    total, steps = re.search(r"'train_runtime': '?([0-9.]+)", log), re.search(r"(\d+)/\1 \[", log)
    if total and steps:
        return float(total[1]) / int(steps[1])
    return 1 / float(rate[1]) if rate and float(rate[1]) else math.nan


def one(python: Path, *, theirs: bool, steps: int = 10, padded: bool = False) -> Took:
    """One whole run in a fresh folder with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="olive-bench-") as name:
        folder = Path(name)
        lines = (EXAMPLE / "dataset" / "dataset-classification.json").read_text().splitlines()[:ROWS]
        (folder / "rows.json").write_text("\n".join(lines) + "\n")
        body = document(folder, theirs=theirs, steps=steps, padded=padded)
        (folder / "doc.json").write_text(json.dumps(body))
        return timed([str(python), "-m", "olive", "run", "--config", "doc.json"], folder)


def main() -> int:
    """Time both in turn and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--defaults", action="store_true")
    options = parser.parse_args()
    theirs = environment()
    ours = None
    for index in range(options.runs):
        ours = one(Path(sys.executable), theirs=False)
        olive = one(theirs, theirs=True)
        print(f"run {index}: ours   {ours}")
        print(f"       Olive  {olive}")
        print(
            f"       {olive.seconds / ours.seconds:.2f}x faster, {ours.memory / olive.memory:.2f}x its memory"
        )
    if options.defaults and ours is not None:
        olive = one(theirs, theirs=True, steps=1, padded=True)
        print(f"Olive, one step with its defaults: {olive}")
        print(f"       a step of ours is {olive.step / ours.step:.1f}x faster")
    return 0


if __name__ == "__main__":
    sys.exit(main())
