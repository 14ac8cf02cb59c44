from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from olive.config import training_args
from olive.config.positions import Document
from olive.config.tree import Findings, Node, grow
from olive.errors import Problem, Severity


def checked(values: Any) -> tuple[Any, list[Problem]]:
    node: Node = grow(values)
    findings = Findings(Document(values))
    training_args.check(node, findings)
    return node.plain(), findings.problems


def errors(values: Any) -> list[Problem]:
    return [problem for problem in checked(values)[1] if problem.severity is Severity.ERROR]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.03}, {"warmup_steps": 0.03}),
        ({"extra_args": {"weight_decay": 0.1}}, {"weight_decay": 0.1}),
        ({"per_gpu_train_batch_size": 2}, {"per_device_train_batch_size": 2}),
        ({"output_dir": "x", "save_safetensors": True, "fp16_backend": "auto"}, {}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"early_stopping_steps": 3}, {"early_stopping_patience": 3}),
        ({"seed": 3.0}, {"seed": 3}),
    ],
)
def test_old_names(old: dict[str, Any], new: dict[str, Any]) -> None:
    value, problems = checked(old)
    assert value == new
    assert all(problem.severity is Severity.NOTE for problem in problems)
    assert len(problems) == (len(old) if "seed" not in old else 0)
    assert checked(value) == (new, [])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"learning_rat": 1e-4}, "did you mean `learning_rate`"),
        ({"evaluation_strategi": "no"}, "did you mean `evaluation_strategy`"),
        ({"max_steps": "10"}, "without quotes"),
        ({"max_steps": True}, "a whole number"),
        ({"max_steps": 0}, "train nothing"),
        ({"max_steps": 10**9}, "out of range"),
        ({"learning_rate": 1e9}, "out of range"),
        ({"learning_rate": -1e-4}, "out of range"),
        ({"per_device_train_batch_size": 0}, "out of range"),
        ({"gradient_checkpointing": 1}, "true or false"),
        ({"seed": 0.5}, "a whole number"),
        ({"eval_strategy": "step"}, "did you mean `steps`"),
        ({"lr_scheduler_type": "cosin"}, "did you mean `cosine`"),
        ({"optim": "adam"}, "none of its values"),
        ({"train_sampling_strategy": "sorted"}, "none of its values"),
        ({"lr_scheduler_kwargs": 3}, "an object"),
        ({"early_stopping_patience": 0}, "out of range"),
        ({"early_stopping_patience": 1.5}, "a whole number"),
        ({"early_stopping_threshold": -0.1}, "out of range"),
        ({"early_stoping_patience": 2}, "did you mean `early_stopping_patience`"),
        ({"hub_token": "abc"}, "HF_TOKEN"),
        ([], "should be an object"),
        ({"evaluation_strategy": "no", "eval_strategy": "steps"}, "both are given"),
    ],
)
def test_refused(values: Any, text: str) -> None:
    (problem,) = errors(values)
    assert text in str(problem)
    assert problem.where is not None


def test_secrets_are_not_repeated() -> None:
    assert "abc" not in str(errors({"hub_token": "abc"})[0])


@pytest.mark.parametrize(
    "values",
    [
        {"report_to": "none"},
        {"report_to": ["tensorboard"]},
        {"eval_steps": None},
        {"eval_steps": 0.5},
        {"max_steps": -1},
        {"seed": 4294967295},
        {"num_train_epochs": 3},
        {"lr_scheduler_kwargs": {"a": 1}},
        {"optim": "paged_adamw_32bit"},
        {"lr_scheduler_type": "constant"},
        {"save_strategy": "best"},
        {"dataloader_multiprocessing_context": "fork"},
        {"hub_token": None},
        {"early_stopping_patience": 3, "early_stopping_threshold": 0.01},
    ],
)
def test_accepted(values: dict[str, Any]) -> None:
    assert checked(values)[1] == []


@pytest.mark.full
def test_the_fields_are_those_that_transformers_takes() -> None:
    from transformers import TrainingArguments

    real = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(training_args.fields()) == set(real) | set(training_args.OWN)
    assert not set(real) & set(training_args.OWN)
    for name, field in training_args.fields().items():
        if name in training_args.OWN:
            continue
        default = real[name].default
        if isinstance(default, (bool, int, float, str)):
            assert type(default).__name__ in field.kinds | ({"int"} if "float" in field.kinds else set()) or (
                "str" in field.kinds
            ), name
