"""Older spellings of data configs and evaluators."""

from __future__ import annotations

from olive.config.rewrite import (
    Context,
    canonical,
    drop,
    drop_all,
    given,
    hoist,
    lift,
    rename,
    rename_all,
    section,
    text,
)
from olive.config.suggest import did_you_mean
from olive.config.tree import Node
from olive.config.workflow import PreProcess

CONTAINERS = ("HuggingfaceContainer", "DataContainer")
LOADERS = ("huggingface_dataset",)
PRE_PROCESSORS = (
    "text_generation_huggingface_pre_process",
    "huggingface_pre_process",
    "text_generation_pre_process",
)
PARTS: dict[str, str] = {
    "load_dataset": "load_dataset_config",
    "pre_process_data": "pre_process_data_config",
    "post_process_data": "post_process_data_config",
    "dataloader": "dataloader_config",
}
LOAD_KEYS = ("data_name", "subset", "split", "data_dir", "data_files")
PRE_RENAMED: dict[str, str] = {"corpus_strategy": "strategy", "source_max_len": "max_seq_len"}
FROM_MODEL = "of a data config has no effect: it is taken from the input model"
PRE_WITHOUT_EFFECT: dict[str, str] = {
    "model_name": f"{FROM_MODEL}",
    "task": f"{FROM_MODEL}",
    "trust_remote_code": f"{FROM_MODEL}",
    "processing_batch_size": "has no effect: it never changes the result",
    "use_eos_token_as_pad_token": "has no effect: padding is never computed",
}
PRE_CODE = ("text_formatting_func", "user_script", "script_dir", "pair_format", "prompt_template")
LOAD_WITHOUT_EFFECT: dict[str, str] = {
    "label_cols": "has no effect for text generation",
    "label_name": "has no effect",
}
LOADER_WITHOUT_EFFECT: dict[str, str] = {
    "shuffle": "of the dataloader has no effect: evaluation keeps the order of the rows",
    "drop_last": "of the dataloader has no effect: no row is dropped",
    "num_workers": "of the dataloader has no effect",
}
METRIC_WITHOUT_EFFECT: dict[str, str] = {
    "backend": "of a metric has no effect: torchmetrics is used",
    "data_dir": "of `user_config` has no effect: use `data_config`",
    "user_config": "of a metric has no effect",
}
METRIC_CONFIG: dict[str, str] = {"warmup_num": "warmup", "repeat_test_num": "repeat"}
DATA = ("data_configs", "*")
METRIC = ("evaluators", "*", "metrics", "*")
OLD_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    DATA: ("params_config", "component_kwargs", "components", "post_process_data_config", *PARTS, *LOAD_KEYS),
    (*DATA, "load_dataset_config"): ("params", "type", "kwargs", *LOAD_WITHOUT_EFFECT),
    (*DATA, "pre_process_data_config"): (
        "params", "type", "kwargs", "dataset_type", *PRE_RENAMED, *PRE_WITHOUT_EFFECT, *PRE_CODE,
    ),
    (*DATA, "dataloader_config"): ("params", "type", "kwargs", *LOADER_WITHOUT_EFFECT),
    METRIC: ("user_config", "backend", "metric_config"),
    (*METRIC, "sub_types", "*"): ("metric_config",),
    ("evaluators", "*"): ("type", "name"),
}  # fmt: skip


def rewrite_data_configs(context: Context) -> None:
    """Every data config to today's spelling."""
    data = context.root.members.get("data_configs")
    for config in data.items if data is not None else []:
        if isinstance(config.value, dict):
            _data_config(context, config)


def _data_config(context: Context, config: Node) -> None:
    findings = context.findings
    kind = config.members.get("type")
    if kind is not None and isinstance(kind.value, str):
        if canonical(kind, CONTAINERS) is None:
            findings.error(
                f"`type`: {kind.value!r} is no kind of dataset in this version",
                kind.origin,
                did_you_mean(kind.value, CONTAINERS[:1]),
            )
        kind.value = CONTAINERS[0]
    _params_config(context, config)
    lift(config, "components", findings, "`components` is gone: each part is a `..._config` of its own")
    lift(
        config,
        "component_kwargs",
        findings,
        "`component_kwargs` is gone: each part is a `..._config` of its own",
    )
    rename_all(config, PARTS, findings)
    drop_all(
        config,
        {key: PRE_WITHOUT_EFFECT[key] for key in ("model_name", "task", "trust_remote_code")},
        findings,
    )
    drop(config, "post_process_data_config", findings, "has no effect for text generation")
    for key, known in (
        ("load_dataset_config", LOADERS),
        ("pre_process_data_config", PRE_PROCESSORS),
        ("dataloader_config", ()),
    ):
        part = config.members.get(key)
        if part is not None and isinstance(part.value, dict):
            _component(context, part, key, known)
    load = config.members.get("load_dataset_config")
    if load is not None and isinstance(load.value, dict):
        _load(context, load)
    pre = config.members.get("pre_process_data_config")
    if pre is None and context.old:
        pre = config.value["pre_process_data_config"] = Node({}, config.origin)
    if pre is not None and isinstance(pre.value, dict):
        _pre_process(context, pre)
    loader = config.members.get("dataloader_config")
    if loader is not None and isinstance(loader.value, dict):
        drop_all(loader, LOADER_WITHOUT_EFFECT, findings)


def _params_config(context: Context, config: Node) -> None:
    """`params_config`: flat settings of every part, and `component_kwargs`."""
    findings = context.findings
    flat = config.members.get("params_config")
    lift(config, "params_config", findings, "`params_config` is gone: see `load_dataset_config`")
    if flat is None or "load_dataset_config" in config.members:
        return
    moved: dict[str, dict[str, Node]] = {"load_dataset": {}, "pre_process_data": {}, "dataloader": {}}
    old_pre = {*PreProcess.model_fields, *PRE_RENAMED, "dataset_type", *PRE_CODE}
    for key in list(config.members):
        if key in LOAD_KEYS:
            moved["load_dataset"][key] = config.members.pop(key)
        elif key in old_pre:
            moved["pre_process_data"][key] = config.members.pop(key)
        elif key in ("batch_size", *LOADER_WITHOUT_EFFECT):
            moved["dataloader"][key] = config.members.pop(key)
    kwargs = config.members.get("component_kwargs", Node({}, ())).members
    for part, settings in moved.items():
        if settings:
            origin = next(iter(settings.values())).origin[:-1]
            found = kwargs.get(part) or config.value.setdefault(PARTS[part], Node({}, origin))
            if isinstance(found.value, dict):
                found.value = settings | found.value


def _component(context: Context, part: Node, key: str, known: tuple[str, ...]) -> None:
    findings = context.findings
    lift(part, "params", findings, "`params` of a data component is gone: its settings stand directly in it")
    lift(part, "kwargs", findings, "`kwargs` of a data component is gone: its settings stand directly in it")
    drop(part, "name", findings, "of a data component has no effect")
    kind = part.members.pop("type", None)
    if kind is None or kind.value is None:
        return
    if isinstance(kind.value, str) and (not known or kind.value.lower() in known):
        findings.note(f"`type` of `{key}` is gone: there is one kind", kind.origin)
    else:
        findings.error(
            f"`type` of `{key}`: {text(kind.plain())} is code of your own, which this version does not run",
            kind.origin,
            "write the rows to a json file and name it in `data_files`",
        )


def _load(context: Context, load: Node) -> None:
    drop_all(load, LOAD_WITHOUT_EFFECT, context.findings)
    files = load.members.get("data_files")
    if files is not None and "type" in files.members:
        kind = text(files.members["type"].plain())
        context.findings.error(
            f"`data_files` is of type {kind}; this version reads local files and hub datasets",
            files.origin,
            "download the file and give its path",
        )
        files.value = "unsupported"


def _pre_process(context: Context, pre: Node) -> None:
    findings = context.findings
    kind = pre.members.pop("dataset_type", None)
    if kind is not None and kind.value not in (None, "corpus"):
        findings.error(
            f"`dataset_type: {text(kind.plain())}` is not supported; only corpora are",
            kind.origin,
            "write prompt and answer as a `text_template`",
        )
    elif kind is not None:
        findings.note("`dataset_type` has no effect: every dataset is a corpus", kind.origin)
    for key in PRE_CODE:
        found = pre.members.pop(key, None)
        if found is not None and found.value is not None:
            findings.error(
                f"`{key}` is code of your own, which this version does not run",
                found.origin,
                "write the text as a `text_template`",
            )
    new = {"strategy", "max_seq_len"} & pre.members.keys() and not PRE_RENAMED.keys() & pre.members.keys()
    rename_all(pre, PRE_RENAMED, findings)
    drop_all(pre, PRE_WITHOUT_EFFECT, findings)
    columns = pre.members.get("text_cols")
    if columns is not None and isinstance(columns.value, str):
        columns.value = [Node(columns.value, columns.origin)]
    for key in ("strategy", "padding_side"):
        found = pre.members.get(key)
        if found is not None and isinstance(found.value, str):
            found.value = found.value.lower()
    joiner = pre.members.get("joiner")
    if joiner is not None and joiner.value is None:
        joiner.value = ""
    if context.old and not new:
        _old_defaults(context, pre)


def _old_defaults(context: Context, pre: Node) -> None:
    """Olive 0.6 took rows one by one unless told otherwise, and joined them with nothing between."""
    if not given(pre, "strategy"):
        pre.value["strategy"] = Node("line-by-line", pre.origin)
        context.findings.note(
            'no `corpus_strategy` is given: Olive 0.6 meant "line-by-line", which is kept', pre.origin
        )
    if str(pre.members["strategy"].value).startswith("join") and "joiner" not in pre.members:
        pre.value["joiner"] = Node("", pre.origin)
        context.findings.note(
            "no `joiner` is given: Olive 0.6 joined rows directly, which is kept", pre.origin
        )


def rewrite_evaluators(context: Context) -> None:
    """Every evaluator to today's spelling."""
    root, findings = context.root, context.findings
    evaluators = root.members.get("evaluators")
    for evaluator in (evaluators.members if evaluators is not None else {}).values():
        kind = evaluator.members.pop("type", None)
        if kind is not None and str(kind.value).lower() not in ("none", "oliveevaluator", "onnxevaluator"):
            findings.error(
                f"`type`: this version has no evaluator of type {text(kind.plain())}",
                kind.origin,
                "list `metrics` instead",
            )
            stand_in = {"name": Node("size", kind.origin), "type": Node("size_on_disk", kind.origin)}
            evaluator.value = {"metrics": Node([Node(stand_in, kind.origin)], kind.origin)}
        drop(evaluator, "name", findings, "of an evaluator has no effect: it is named by its key")
        metrics = evaluator.members.get("metrics")
        for metric in metrics.items if metrics is not None else []:
            if isinstance(metric.value, dict):
                _metric(context, metric)


def _metric(context: Context, metric: Node) -> None:
    findings = context.findings
    canonical(metric.members.get("type"), ("accuracy", "perplexity", "latency", "throughput", "size_on_disk"))
    lift(
        metric, "user_config", findings, "`user_config` of a metric is gone: its settings stand beside `type`"
    )
    subs = metric.members.get("sub_types")
    for index, sub in enumerate(subs.items if subs is not None else []):
        if isinstance(sub.value, str):
            subs_items = subs.items if subs is not None else []
            subs_items[index] = sub = Node({"name": Node(sub.value, sub.origin)}, sub.origin)
        settings = sub.members.pop("metric_config", None)
        for key, child in (settings.members if settings is not None else {}).items():
            new = METRIC_CONFIG.get(key)
            if new is None:
                findings.note(f"`{key}` of `metric_config` has no effect", child.origin)
            elif new not in metric.members:
                findings.note(f"`{key}` of `metric_config` is now `{new}` of the metric", child.origin)
                metric.value[new] = child
    rename(metric, "metric_config", "user_config", findings)
    drop_all(metric, METRIC_WITHOUT_EFFECT, findings)
    names = [
        sub.members["name"].value for sub in (subs.items if subs is not None else []) if "name" in sub.members
    ]
    kind = metric.members.get("type")
    if kind is not None and kind.value == "accuracy" and names and names == ["perplexity"] * len(names):
        findings.note("perplexity is now a metric `type` of its own", kind.origin)
        kind.value = "perplexity"
    hoist(
        metric,
        "data_config",
        section(context.root, "data_configs", []),
        f"{metric.members['name'].value if 'name' in metric.members else 'metric'}_data",
        findings,
        "a data config",
    )
