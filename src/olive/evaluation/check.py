"""What is wrong with an evaluator, found before any work and without a heavy import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches

from olive.config.workflow import Evaluator, Metric, Workflow
from olive.errors import Problem, Severity
from olive.evaluation.catalog import NEEDS_DATA, NUMBERS


def check_evaluator(evaluator: Evaluator, workflow: Workflow) -> list[Problem]:
    """Problems of one evaluator of ``workflow``; ``where`` is the JSON path below the document."""
    name = next((name for name, known in workflow.evaluators.items() if known is evaluator), "evaluator")
    root = f"$.evaluators.{name}.metrics"
    problems: list[Problem] = []
    for index, metric in enumerate(evaluator.metrics):
        where = f"{root}[{index}]"
        problems += _check_names(metric, where)
        problems += _check_data(metric, workflow, where)
        problems += _check_goals(metric, workflow, where)
    for metric_name, count in Counter(metric.name for metric in evaluator.metrics).items():
        if count > 1:
            problems.append(
                Problem(f"{count} metrics are called {metric_name!r}", root, "Give each its own name.")
            )
    priorities = Counter(sub.priority for metric in evaluator.metrics for sub in metric.sub_types)
    for priority, count in priorities.items():
        if priority > 0 and count > 1:
            problems.append(
                Problem(
                    f"{count} numbers have priority {priority}", root, "Give each its own; -1 only reports."
                )
            )
    return problems


def _check_names(metric: Metric, where: str) -> Iterator[Problem]:
    known = NUMBERS[metric.type]
    for index, sub in enumerate(metric.sub_types):
        place = f"{where}.sub_types[{index}]"
        if sub.name not in known:
            close = get_close_matches(sub.name.lower(), list(known), n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            yield Problem(
                f"{metric.type} has no number called {sub.name!r}",
                f"{place}.name",
                f"{hint}It has: {', '.join(known)}.",
            )
        elif sub.higher_is_better not in (None, known[sub.name].higher_is_better):
            right = "higher" if known[sub.name].higher_is_better else "lower"
            yield Problem(
                f"{sub.name} of {metric.type} is better when {right}; higher_is_better is ignored",
                f"{place}.higher_is_better",
                "Leave it out.",
                severity=Severity.WARNING,
            )
    for sub_name, count in Counter(sub.name for sub in metric.sub_types).items():
        if count > 1:
            yield Problem(f"{sub_name} is listed {count} times", f"{where}.sub_types", "List it once.")


def _check_data(metric: Metric, workflow: Workflow, where: str) -> Iterator[Problem]:
    if metric.labels and metric.type != "accuracy":
        yield Problem(
            f"labels mean nothing to {metric.type}",
            f"{where}.labels",
            "Leave them out.",
            severity=Severity.WARNING,
        )
    names = [config.name for config in workflow.data_configs]
    if metric.data_config is None:
        if metric.type in NEEDS_DATA:
            known = ", ".join(names) or "none yet: add one to data_configs"
            yield Problem(f"{metric.type} needs data", where, f"Set data_config to one of: {known}.")
        return
    if metric.data_config not in names:
        close = get_close_matches(metric.data_config, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"data configs here: {', '.join(names) or 'none'}"
        yield Problem(f"there is no data config called {metric.data_config!r}", f"{where}.data_config", hint)
        return
    pre = workflow.data_config(metric.data_config).pre_process_data_config
    if metric.type == "accuracy" and not pre.chat_template and pre.format is None:
        fields = pre.text_template.count("{") if pre.text_template is not None else len(pre.text_cols)
        if fields < 2:
            yield Problem(
                f"accuracy needs an answer, and data config {metric.data_config!r} has one field alone",
                f"{where}.data_config",
                'Give it a text_template whose last field is the answer, e.g. "{question}\\n{answer}".',
            )


def _check_goals(metric: Metric, workflow: Workflow, where: str) -> Iterator[Problem]:
    for index, sub in enumerate(metric.sub_types):
        if sub.goal is None:
            continue
        place = f"{where}.sub_types[{index}].goal"
        if sub.goal.type != "threshold" and not workflow.evaluate_input_model:
            yield Problem(
                f"a goal of type {sub.goal.type} compares with the input model, which is not evaluated",
                place,
                "Set evaluate_input_model to true, or use a threshold.",
            )
        if sub.goal.type != "threshold" and sub.goal.value < 0:
            yield Problem(f"a goal of type {sub.goal.type} needs a value of 0 or more", f"{place}.value")
