from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from olive.config.workflow import DataConfig, Evaluator, HfModel, LoadDataset, PreProcess, Workflow
from olive.errors import Severity
from olive.evaluation.catalog import NUMBERS
from olive.evaluation.check import check_evaluator


def _check(*metrics: dict[str, Any], **settings: Any) -> list[tuple[str, str, str | None, str | None]]:
    evaluator = Evaluator.model_validate({"metrics": metrics})
    workflow = Workflow(
        input_model=HfModel(model_path="m"),
        data_configs=(
            DataConfig(
                name="tones",
                load_dataset_config=LoadDataset(data_name="json"),
                pre_process_data_config=PreProcess(text_template="{phrase}\n{tone}"),
            ),
            DataConfig(name="plain", load_dataset_config=LoadDataset(data_name="json")),
        ),
        evaluators={"common": evaluator},
        **settings,
    )
    found = check_evaluator(workflow.evaluators["common"], workflow)
    return [(problem.severity.value, problem.message, problem.where, problem.fix) for problem in found]


def test_every_metric_of_the_document_is_fine_alone() -> None:
    for kind in NUMBERS:
        assert _check({"name": "m", "type": kind, "data_config": "tones"}) == []
        subs = [{"name": name} for name in NUMBERS[kind]]
        assert _check({"name": "m", "type": kind, "data_config": "tones", "sub_types": subs}) == []


@pytest.mark.parametrize(
    ("metric", "message", "where", "fix"),
    [
        (
            {"type": "latency", "sub_types": [{"name": "avgg"}]},
            "no number called 'avgg'",
            ".sub_types[0].name",
            "mean avg?",
        ),
        (
            {"type": "accuracy", "data_config": "tones", "sub_types": [{"name": "Exact-Match"}]},
            "'Exact-Match'",
            ".sub_types[0].name",
            "mean exact_match?",
        ),
        ({"type": "accuracy"}, "accuracy needs data", "", "tones, plain"),
        ({"type": "perplexity"}, "perplexity needs data", "", "tones, plain"),
        ({"type": "perplexity", "data_config": "tone"}, "called 'tone'", ".data_config", "mean tones?"),
        ({"type": "accuracy", "data_config": "plain"}, "needs an answer", ".data_config", "last field"),
        (
            {"type": "latency", "sub_types": [{"name": "avg"}, {"name": "avg"}]},
            "listed 2 times",
            ".sub_types",
            "once",
        ),
    ],
)
def test_mistakes_are_named(metric: dict[str, Any], message: str, where: str, fix: str) -> None:
    (found,) = _check({"name": "m", **metric})
    assert found[0] == Severity.ERROR
    assert message in found[1]
    assert found[2] == f"$.evaluators.common.metrics[0]{where}"
    assert fix in str(found[3])


def test_a_wrong_direction_is_a_warning() -> None:
    ((severity, message, _, _),) = _check(
        {"name": "m", "type": "latency", "sub_types": [{"name": "avg", "higher_is_better": True}]}
    )
    assert severity == Severity.WARNING
    assert "better when lower" in message


def test_names_and_priorities_are_unique() -> None:
    size = {"name": "s", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 1}]}
    latency = {"name": "s", "type": "latency", "sub_types": [{"name": "avg", "priority": 1}]}
    messages = [message for _, message, _, _ in _check(size, latency)]
    assert messages == ["2 metrics are called 's'", "2 numbers have priority 1"]


def test_relative_goals_need_the_input_model() -> None:
    goal = {"type": "max-degradation", "value": 0.02}
    metric = {
        "name": "m",
        "type": "accuracy",
        "data_config": "tones",
        "sub_types": [{"name": "exact_match", "goal": goal}],
    }
    assert _check(metric) == []
    ((_, message, where, _),) = _check(metric, evaluate_input_model=False)
    assert "compares with the input model" in message
    assert str(where).endswith(".goal")


def test_checking_imports_nothing_heavy() -> None:
    code = "import sys, olive.evaluation.check; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
