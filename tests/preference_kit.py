"""Preference rows, and TRL's own trainers on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.config.workflow import DataConfig
from training_kit import WORDS

TONES = ("sadness", "joy", "fear", "surprise")


def pairs(count: int = 24) -> list[dict[str, str]]:
    """The right tone is preferred to a longer wrong one."""
    made = []
    for index in range(count):
        words = [WORDS[(index * 7 + k * (1 + index % 5)) % len(WORDS)] for k in range(4 + index % 9)]
        made.append(
            {
                "prompt": f"### Text: {' '.join(words)} {index}\n### The tone is:\n",
                "chosen": TONES[index % 4],
                "rejected": f"{TONES[(index + 1) % 4]} or {TONES[(index + 2) % 4]}",
            }
        )
    return made


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def data(path: Path, **pre: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": "train",
            "load_dataset_config": {"data_name": "json", "data_files": str(path), "split": "train"},
            "pre_process_data_config": {"max_seq_len": 96} | pre,
        }
    )


def trl_trainer(
    kind: str, model: Any, tokenizer: Any, rows: list[dict[str, str]], folder: Path, **args: Any
) -> Any:
    """TRL's trainer of ``kind``, on the CPU in float32, rows in their order, a step a batch."""
    from datasets import Dataset

    if kind == "DPO":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            import torch

            return torch.utils.data.SequentialSampler(self.train_dataset)

    given = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "max_length": 96,
    }
    return InOrder(
        model=model,
        args=Config(**(given | args)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
