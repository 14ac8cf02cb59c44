"""Small datasets, and what to look at in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.workflows import plan
from olive.workflows.recipe import Recipe, Request, finetune

LABELS = ("fear", "joy", "sadness", "surprise")


def tones(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"phrase": f"the {index}th day of rain and wind", "tone": LABELS[index % 4]} for index in range(count)
    ]


def preferences(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": f"the {n}th day of rain\nTone:\n", "chosen": LABELS[n % 4], "rejected": "I could not say"}
        for n in range(count)
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
