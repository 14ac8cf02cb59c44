"""Rows, a data config and a context to train tiny models in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.config.workflow import Accelerator, DataConfig
from olive.hardware.probe import probe
from olive.passes.base import PassContext
from olive.store.journal import Journal

WORDS = (
    *("the", "rain", "would", "not", "stop", "and", "I", "missed", "you", "all", "day", "we", "won", "match"),
    *("danced", "street", "something", "moved", "behind"),
)


class Notes:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.updates: list[dict[str, Any]] = []

    def start(self, task: str, total: int | None = None) -> None:
        self.total = total

    def update(self, done: int, **fields: float | str) -> None:
        self.updates.append({"done": done, **fields})

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


def rows(folder: Path, count: int = 24) -> Path:
    lines = []
    for index in range(count):
        words = [WORDS[(index * 7 + k * (1 + index % 5)) % len(WORDS)] for k in range(4 + index % 9)]
        tone = ("sadness", "joy", "fear", "surprise")[index % 4]
        lines.append(json.dumps({"phrase": f"{' '.join(words)} {index}", "tone": tone}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def data(path: Path, **pre: Any) -> DataConfig:
    return DataConfig.model_validate(
        {
            "name": "train",
            "load_dataset_config": {"data_name": "json", "data_files": str(path), "split": "train"},
            "pre_process_data_config": {
                "text_cols": ["phrase", "tone"],
                "text_template": "### Text: {phrase}\n### The tone is:\n{tone}",
                "strategy": "line-by-line",
                "max_seq_len": 64,
            }
            | pre,
        }
    )


def context(folder: Path, config: DataConfig) -> PassContext:
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    machine = probe()
    return PassContext(
        out=out,
        machine=machine.model_copy(update={"cores": 1}),
        accelerator=Accelerator(),
        target=Accelerator(),
        data={config.name: config},
        base_dir=folder,
        progress=Notes(),
        journal=Journal(folder / "journal"),
    )
