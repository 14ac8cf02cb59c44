"""What is allowed and yet cannot be meant: wrong names, contradictions, settings without effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from olive.config.positions import JsonPath
from olive.config.rewrite import Context, text
from olive.config.suggest import closest
from olive.config.workflow import DataConfig, Workflow, mix_cycle

_GPU_ONLY = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider",
             "ROCMExecutionProvider", "MIGraphXExecutionProvider")  # fmt: skip


def references(context: Context, broken: set[JsonPath]) -> None:
    """Report every name that names nothing. Sections that are in error themselves are not blamed twice.

    Args:
        context: the rewritten document.
        broken: paths in error.
    """
    root = context.root
    known = {
        "systems": list(root.members["systems"].members) if "systems" in root.members else ["local_system"],
        "evaluators": list(root.members["evaluators"].members) if "evaluators" in root.members else [],
        "data_configs": _data_names(context),
    }
    unclear = {str(path[0]) for path in broken if len(path) > 1} | _sections_misspelt(context, broken)
    for path, section in _references(context):
        node = root.at(path)
        if section in unclear or not isinstance(node.value, str) or node.value in known[section]:
            continue
        names = known[section]
        near = closest(node.value, names)
        there = f"there are: {', '.join(names)}" if names else f"there is no `{section}` section"
        what = {"systems": "system", "evaluators": "evaluator", "data_configs": "data config"}[section]
        fix = f"did you mean `{near}`?" if near else there
        context.findings.error(f"no {what} is called {text(node.value)}", node.origin, fix)


def _sections_misspelt(context: Context, broken: set[JsonPath]) -> set[str]:
    unknown = {str(path[0]) for path in broken if len(path) == 1}
    if unknown - set(Workflow.model_fields):
        return {"systems", "evaluators", "data_configs"}
    return unknown


def _data_names(context: Context) -> list[str]:
    section = context.root.members.get("data_configs")
    found: list[str] = []
    for item in section.items if section is not None else []:
        name = item.members.get("name")
        if name is None or not isinstance(name.value, str):
            continue
        if name.value in found:
            context.findings.error(
                f"two data configs are called {text(name.value)}", name.origin, "rename one"
            )
        found.append(name.value)
    return found


def _references(context: Context) -> Iterable[tuple[JsonPath, str]]:
    root = context.root
    for key, section in (("host", "systems"), ("target", "systems"), ("evaluator", "evaluators")):
        if key in root.members:
            yield (key,), section
    for name, entry in root.members["passes"].members.items() if "passes" in root.members else ():
        kind = entry.members.get("type")
        fields = {"host": "systems", "evaluator": "evaluators"}
        if kind is not None and kind.value in context.pass_names:
            fields |= context.params_of(str(kind.value)).references()
        for key, section in fields.items():
            if key in entry.members:
                yield ("passes", name, key), section
    yield from _parts_of_mixes(context)
    for name, evaluator in root.members["evaluators"].members.items() if "evaluators" in root.members else ():
        metrics = evaluator.members.get("metrics")
        for index, metric in enumerate(metrics.items if metrics is not None else []):
            if "data_config" in metric.members:
                yield ("evaluators", name, "metrics", index, "data_config"), "data_configs"


def _parts_of_mixes(context: Context) -> Iterable[tuple[JsonPath, str]]:
    data = context.root.members.get("data_configs")
    for index, config in enumerate(data.items if data is not None else []):
        mix = config.members.get("mix")
        for place, part in enumerate(mix.items if mix is not None else []):
            if "name" in part.members:
                yield ("data_configs", index, "mix", place, "name"), "data_configs"


def lint(context: Context, workflow: Workflow) -> None:
    """Report contradictions and settings without effect."""
    _places(context, workflow)
    for index, config in enumerate(workflow.data_configs):
        _data(context, index, config)
        _mix(context, workflow, index, config)
    for name, entry in workflow.passes.items():
        arguments = getattr(entry.params, "training_args", None)
        if isinstance(arguments, dict):
            _training(context, ("passes", name), entry.params.model_dump(), arguments)
    _unused(context, workflow)


def _origin(context: Context, path: JsonPath) -> JsonPath:
    return context.root.at(path).origin


def _places(context: Context, workflow: Workflow) -> None:
    findings = context.findings
    if workflow.cache_dir.rstrip("/") == workflow.output_dir.rstrip("/"):
        fix = 'for example "cache_dir": ".olive-cache"'
        findings.error(
            "`cache_dir` and `output_dir` are the same folder", _origin(context, ("cache_dir",)), fix
        )
    if not workflow.passes and not (workflow.evaluator and workflow.evaluate_input_model):
        findings.warn("there are no passes: nothing will be done", context.root.origin)
    for name, system in workflow.systems.items():
        for index, accelerator in enumerate(system.accelerators):
            providers = accelerator.execution_providers
            path = ("systems", name, "accelerators", index, "execution_providers")
            if accelerator.device == "cpu" and any(provider in _GPU_ONLY for provider in providers):
                findings.warn(
                    f"{providers[0]} does not run on device cpu", _origin(context, path), "set device to gpu"
                )


def _data(context: Context, index: int, config: DataConfig) -> None:
    findings, pre = context.findings, config.pre_process_data_config
    base: JsonPath = ("data_configs", index, "pre_process_data_config")

    def at(key: str) -> JsonPath:
        return _origin(context, (*base, key))

    if pre.pad_to_max_len:
        findings.note("`pad_to_max_len` has no effect: padding is never computed, the result is the same",
                      at("pad_to_max_len"))  # fmt: skip
    if pre.strategy == "join-sliding-window" and pre.stride is None:
        findings.error(
            "join-sliding-window needs `stride`, the step in tokens", at("strategy"), "set `stride`"
        )
    if pre.stride is not None and pre.stride > pre.max_seq_len:
        findings.error(f"`stride` {pre.stride} beyond `max_seq_len` {pre.max_seq_len} would leave tokens out",
                       at("stride"), "at most `max_seq_len`")  # fmt: skip
    if pre.strategy.endswith("-random") and pre.max_samples is None:
        fix = "set `max_samples`"
        findings.error(f"{pre.strategy} needs `max_samples`, the number of draws", at("strategy"), fix)
    if pre.chat_template and pre.text_template is not None:
        findings.warn("both `chat_template` and `text_template` are given: only `chat_template` is used",
                      at("text_template"), "keep one of them")  # fmt: skip
    if pre.format is not None and pre.text_template is not None:
        findings.error("both `format` and `text_template` say what a row's text is",
                       at("format"), "keep one of them")  # fmt: skip
    if pre.train_on == "assistant" and pre.text_template is not None and not pre.chat_template:
        findings.error("`train_on: assistant` needs chat turns, and there is a `text_template`",
                       at("train_on"), "set `train_on` to completion, or give a `format`")  # fmt: skip
    templated = pre.text_template is not None or pre.chat_template or pre.format is not None
    if pre.train_on == "completion" and not templated:
        findings.error("`train_on: completion` needs a template that says where the completion begins",
                       at("train_on"), "give a `text_template`")  # fmt: skip
    if pre.drop_short_sequences and pre.strategy != "line-by-line":
        findings.note(
            "`drop_short_sequences` has an effect with line-by-line only", at("drop_short_sequences")
        )


def _mix(context: Context, workflow: Workflow, index: int, config: DataConfig) -> None:
    """Report a mix that has its rows from itself, and what it says of a text that its parts say."""
    findings, base = context.findings, ("data_configs", index)
    cycle = mix_cycle(workflow.data_configs, config.name)
    if cycle:
        findings.error(
            f"the mix {config.name!r} would have its rows from itself: {' <- '.join(cycle)}",
            _origin(context, (*base, "mix")),
            "take one of them out",
        )
    pre = context.root.at(base).members.get("pre_process_data_config")
    texts = ("text_cols", "text_template", "chat_template", "message_col", "format", "train_on")
    for key in texts if config.mix else ():
        if pre is not None and key in pre.members:
            findings.warn(
                f"`{key}` of a mix has no effect: each row becomes text as its own data config says",
                _origin(context, (*base, "pre_process_data_config", key)),
                f"set it in {', '.join(part.name for part in config.mix)}",
            )


def _training(
    context: Context, base: JsonPath, params: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    findings = context.findings

    def at(key: str) -> JsonPath:
        return _origin(context, (*base, "training_args", key))

    steps = _number(arguments.get("max_steps"))
    bounded = steps is not None and steps > 0
    if bounded and "num_train_epochs" in arguments:
        findings.warn(
            f"`max_steps` {steps:g} decides how long training is; `num_train_epochs` "
            f"{arguments['num_train_epochs']:g} is not used",
            at("num_train_epochs"),
            "keep one of them",
        )
    every = _number(arguments.get("eval_steps"))
    if bounded and every is not None and every > (steps or 0) and arguments.get("eval_strategy") == "steps":
        findings.warn(
            f"evaluation would never happen: `eval_steps` {every:g} is beyond `max_steps` {steps:g}",
            at("eval_steps"),
            f"set `eval_steps` to at most {steps:g}",
        )
    has_data = bool(params.get("eval_data_config") or params.get("eval_dataset_size"))
    if arguments.get("eval_strategy", "no") != "no" and not has_data and "eval_data_config" in params:
        findings.warn(
            f"`eval_strategy` is {arguments['eval_strategy']!r}, but there is nothing to evaluate on",
            at("eval_strategy"),
            "set `eval_dataset_size` or `eval_data_config`",
        )


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _unused(context: Context, workflow: Workflow) -> None:
    used = {(section, context.root.at(path).value) for path, section in _references(context)}
    used |= {("systems", workflow.host), ("systems", workflow.target)}
    for section, what in (
        ("data_configs", "data config"),
        ("evaluators", "evaluator"),
        ("systems", "system"),
    ):
        if section not in context.root.members:
            continue
        names: dict[str, JsonPath] = {name: (section, name) for name in context.root.members[section].members}
        if section == "data_configs":
            names = {config.name: (section, index) for index, config in enumerate(workflow.data_configs)}
        for name, path in names.items():
            if (section, name) not in used:
                context.findings.note(f"nothing uses the {what} {name!r}", _origin(context, path))
