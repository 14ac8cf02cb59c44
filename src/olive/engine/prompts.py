"""Real prompts for the gates and the report, from the document's data where it has any."""

from __future__ import annotations

from olive.config.workflow import DataConfig
from olive.data.prompts import prompts
from olive.data.rows import Row, read
from olive.data.size import sample
from olive.data.template import render
from olive.data.tokens import load
from olive.engine.plan import Plan

_PLAIN = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def add(a, b):\n    return",
    "The three primary colours are red,",
    "Dear Sir or Madam, I am writing to",
    "In the morning she opened the window and",
    "The difference between a list and a tuple is that",
)


def _data_name(plan: Plan) -> str | None:
    """The data that the model will be used on: the evaluators' first, else the passes'."""
    workflow = plan.workflow
    if workflow.evaluator:
        for metric in workflow.evaluators[workflow.evaluator].metrics:
            if metric.data_config:
                return metric.data_config
    for entry in workflow.passes.values():
        for field, section in entry.params.references().items():
            value = getattr(entry.params, field)
            if section == "data_configs" and value:
                return str(value)
    return None


def _rows(plan: Plan, config: DataConfig) -> list[Row]:
    """The rows; of data that is read as a stream, the first ones."""
    shown = plan.previews.get(config.name)
    if shown is not None and shown.streamed:
        return sample(config, plan.base_dir).rows
    return read(config, plan.base_dir)


def sample_prompts(plan: Plan, count: int) -> list[list[int]]:
    """Token ids of ``count`` prompts."""
    assert plan.model is not None  # noqa: S101 - run() has checked it
    folder = (plan.model.base or plan.model).path
    tokenizer = load(folder)
    name = _data_name(plan)
    if name is None:
        return [tokenizer.encode(text, special=True) for text in _PLAIN][:count]
    config = plan.workflow.data_config(name)
    return prompts(_rows(plan, config), config.pre_process_data_config, tokenizer, count)[0]


def rendered_sample(plan: Plan) -> tuple[dict[str, str] | None, str | None]:
    """One rendered row, and the template of the text before the answer; none of rows of numbers."""
    name = _data_name(plan)
    if name is None or (name in plan.previews and not plan.previews[name].parts):
        return None, None
    config = plan.workflow.data_config(name)
    pre = config.pre_process_data_config
    assert plan.model is not None  # noqa: S101 - run() has checked it
    chat = load((plan.model.base or plan.model).path).chat
    text = render(pre, _rows(plan, config)[0], chat)
    template = pre.text_template
    if template is not None:
        template = template[: template.rfind("{")] if "{" in template else None
    return {"prompt": text.prompt, "completion": text.completion}, template
