"""Older spellings to today's: the order of the rewrites; the engine, the model and the systems.

The tables of this module, ``dialects_data`` and ``dialects_passes`` are the whole knowledge of how Olive 0.4
to 0.13 wrote things. A rewrite keeps the meaning: where an older version had another default, the old
default is written out.
"""

from __future__ import annotations

from typing import Any, get_args

from olive.config.dialects_data import rewrite_data_configs, rewrite_evaluators
from olive.config.dialects_passes import rewrite_passes
from olive.config.rewrite import (
    Context,
    canonical,
    drop_all,
    hoist,
    lift,
    normalise_dtype,
    rename,
    rename_all,
    section,
    text,
)
from olive.config.suggest import did_you_mean
from olive.config.tree import Node
from olive.config.workflow import DataConfig, Device, ExecutionProvider, Workflow

OLD_ONLY = frozenset(
    ("hf_config", "params_config", "component_kwargs", "model_loading_args", "lora_r", "lora_alpha")
) | {"corpus_strategy", "source_max_len", "dataset_type"}
ENGINE_WITHOUT_EFFECT: dict[str, str] = {
    "workflow_id": "has no effect: results are found by their content",
    "clean_cache": "has no effect: entries are found by their content; `olive cache gc` frees space",
    "clean_evaluation_cache": "has no effect: evaluations are found by their content",
    "enable_shared_cache": "has no effect in this version",
    "log_to_file": "has no effect: redirect the output instead",
    "plot_pareto_frontier": "has no effect: there is no search in this version",
    "ort_log_severity_level": "has no effect: ONNX Runtime is kept quiet",
    "ort_py_log_severity_level": "has no effect: ONNX Runtime is kept quiet",
    "no_artifacts": "has no effect: the result is always written",
    "output_name": "has no effect: the result stands in `output_dir`",
    "azureml_client": "has no effect: nothing here runs on Azure ML in this version",
    "workflow_host": "has no effect: the workflow runs on this machine",
}
ENGINE_UNSUPPORTED: dict[str, str] = {
    "packaging_config": "this version writes the plain folder `output_dir/model`",
    "auto_optimizer_config": "this version does not choose passes; list them under `passes`",
    "data_root": "this version looks paths up in the current folder; write them in full",
    "builds": "this version makes one model a document",
}
MODEL_RENAMED: dict[str, str] = {
    "model_name": "model_path",
    "model_loading_args": "load_kwargs",
    "from_pretrained_args": "load_kwargs",
}
MODEL_WITHOUT_EFFECT: dict[str, str] = {
    "model_file_format": "has no effect: the form of a model is read from its folder",
    "model_attributes": "of `input_model` has no effect: they are read from config.json",
    "io_config": "of `input_model` has no effect: inputs are known from the architecture",
    "dummy_inputs_func": "of `input_model` has no effect: inputs are known from the architecture",
    "generative": "of `input_model` has no effect",
    "components": "of `hf_config` has no effect: a text model has one part",
    "dataset": "of `hf_config` has no effect: see `data_configs`",
    "model_class": "of `hf_config` has no effect: the class is read from config.json",
    "feature": "of `hf_config` has no effect",
    "is_generative": "of `input_model` has no effect",
    "inference_settings": "of `input_model` has no effect: sessions follow the target's accelerator",
    "use_ort_extensions": "of `input_model` has no effect",
}
GRAPH_WITHOUT_EFFECT: dict[str, str] = {
    "task": "of an OnnxModel has no effect",
    "load_kwargs": "of an OnnxModel has no effect",
}
LOAD_WITHOUT_EFFECT: dict[str, str] = {
    "device_map": "of the model has no effect: placement follows the host's accelerator",
    "max_memory": "of the model has no effect",
    "low_cpu_mem_usage": "of the model has no effect: weights are always loaded one by one",
    "use_safetensors": "of the model has no effect: only safetensors are read",
    "use_cache": "of the model has no effect",
    "use_auth_token": "of the model has no effect: set HF_TOKEN in the environment",
}
SYSTEM_WITHOUT_EFFECT: dict[str, str] = {
    "hf_token": "has no effect on this machine: set HF_TOKEN in the environment",
    "local_docker_config": "has no effect on LocalSystem",
}
OTHER_SYSTEMS = ("AzureML", "Docker", "PythonEnvironment", "IsolatedORT")
OTHER_MODELS = (
    "OpenVINOModel",
    "CompositeModel",
    "TensorFlowModel",
    "QNNModel",
    "DiffusersModel",
)
# Keys that only older documents have, by the place where they end up: candidates for "did you mean".
OLD_NAMES: dict[tuple[str, ...], tuple[str, ...]] = {
    (): (
        "engine",
        "execution_providers",
        "cache_config",
        "pass_flows",
        *ENGINE_WITHOUT_EFFECT,
        *ENGINE_UNSUPPORTED,
    ),
    ("input_model",): ("config", "hf_config", *MODEL_RENAMED, *MODEL_WITHOUT_EFFECT),
    ("input_model", "load_kwargs"): ("extra_args", *LOAD_WITHOUT_EFFECT),
    ("systems", "*"): ("config", *SYSTEM_WITHOUT_EFFECT),
    ("systems", "*", "accelerators", "*"): ("memory",),
}


def is_old(root: Node) -> bool:
    """Whether the document is in the spelling of Olive 0.6 and earlier."""
    engine = root.members.get("engine")
    if engine is not None and "execution_providers" in engine.members:
        return True
    data = root.members.get("data_configs")
    if data is not None and data.members:
        return True
    for system in root.members.get("systems", root).members.values():
        for node in system.walk():
            if (
                node.origin
                and node.origin[-1] == "accelerators"
                and any(isinstance(item.value, str) for item in node.items)
            ):
                return True
    return any(OLD_ONLY & node.members.keys() for node in root.walk())


def rewrite(context: Context) -> None:
    """Rewrite ``context.root`` to today's spelling, in place."""
    root, findings = context.root, context.findings
    _engine(context)
    model = root.members.get("input_model")
    if model is not None and isinstance(model.value, dict):
        _model(context, model)
    data = root.members.get("data_configs")
    if data is not None and isinstance(data.value, dict):
        findings.note("`data_configs` is now a list; each has its `name`", data.origin)
        for name, config in data.members.items():
            if isinstance(config.value, dict):
                config.value = {"name": Node(name, config.origin)} | config.members
        data.value = list(data.members.values())
    rewrite_passes(context)
    rewrite_evaluators(context)
    rewrite_data_configs(context)
    for key in ("host", "target"):
        hoist(root, key, section(root, "systems", {}), f"{key}_system", findings, f"a `{key}` system")
    for system in section(root, "systems", {}).members.values():
        if isinstance(system.value, dict):
            _system(context, system)
    _place(context)
    _tidy(root)


def _engine(context: Context) -> None:
    root, findings = context.root, context.findings
    root.members.pop("$schema", None)  # for editors
    lift(root, "engine", findings, "`engine` is gone: its settings stand at the top level")
    lift(root, "cache_config", findings, "`cache_config` is gone: `cache_dir` stands at the top level")
    drop_all(root, ENGINE_WITHOUT_EFFECT, findings)
    for key, why in ENGINE_UNSUPPORTED.items():
        found = root.members.pop(key, None)
        if found is not None and found.value not in (None, False, [], {}):
            findings.error(f"`{key}` is not supported: {why}", found.origin, f"remove `{key}`")
    hoist(root, "evaluator", section(root, "evaluators", {}), "evaluator", findings, "an evaluator")
    flows = root.members.pop("pass_flows", None)
    if flows is not None and flows.value is not None:
        if flows.plain() == [list(root.members.get("passes", root).members)]:
            findings.note("`pass_flows` is gone: passes run in the order they are written", flows.origin)
        else:
            findings.error(
                "`pass_flows` is not supported: this version runs the passes in the order given",
                flows.origin,
                "order `passes` as they should run, and remove `pass_flows`",
            )
    search = root.members.get("search_strategy")
    if search is not None and search.value not in (None, False):
        findings.error(
            "this version runs the passes in the order given, with the parameters given; it does not search",
            search.origin,
            "set `search_strategy` to false",
        )
        del root.members["search_strategy"]
    cache = root.members.get("cache_dir")
    if cache is not None and len(cache.items) == 1:
        cache.value = cache.items[0].value


def _model(context: Context, model: Node) -> None:
    findings = context.findings
    lift(model, "config", findings, "`config` of `input_model` is gone: its settings stand directly in it")
    inner = model.members.get("hf_config")
    if inner is not None and "model_path" in model.members and "model_name" in inner.members:
        findings.note("`model_name` has no effect beside `model_path`", inner.members["model_name"].origin)
        del inner.members["model_name"]
    lift(model, "hf_config", findings, "`hf_config` is gone: its settings stand directly in `input_model`")
    rename_all(model, MODEL_RENAMED, findings)
    drop_all(model, MODEL_WITHOUT_EFFECT, findings)
    kind = model.members.get("type")
    if kind is not None and isinstance(kind.value, str):
        _model_type(context, model, kind)
    task = model.members.get("task")
    if task is not None and task.value in ("text-generation-with-past", "causal-lm"):
        findings.note(f'`task: "{task.value}"` is now "text-generation"', task.origin)
        task.value = "text-generation"
    load = model.members.get("load_kwargs")
    if load is not None and isinstance(load.value, dict):
        lift(
            load, "extra_args", findings, "`extra_args` is gone: its settings stand directly in `load_kwargs`"
        )
        rename(load, "dtype", "torch_dtype", findings)
        drop_all(load, LOAD_WITHOUT_EFFECT, findings)
        normalise_dtype(findings, load, "torch_dtype")
    path = model.members.get("model_path")
    if path is not None and isinstance(path.value, dict):
        kind_of = text(path.members["type"].plain()) if "type" in path.members else "an object"
        findings.error(f"`model_path` is {kind_of}; this version takes a folder or a hub id", path.origin)
        path.value = "unsupported"


def _model_type(context: Context, model: Node, kind: Node) -> None:
    findings = context.findings
    if str(kind.value).lower() == "pytorchmodel":
        findings.note("`PyTorchModel` is now `HfModel`", kind.origin)
        kind.value = "HfModel"
    elif canonical(kind, ("OnnxModel",)) is not None:
        drop_all(model, GRAPH_WITHOUT_EFFECT, findings)
    elif canonical(kind, ("HfModel",)) is None:
        known = canonical(kind, OTHER_MODELS)
        fix = (
            "give the Hugging Face model it was made from"
            if known
            else did_you_mean(str(kind.value), ("HfModel", "OnnxModel"))
        )
        findings.error(
            f"`type`: this version starts from an HfModel or an OnnxModel, not {kind.value!r}",
            kind.origin,
            fix,
        )
        model.members["type"] = Node("HfModel", kind.origin)
        if known:  # its other settings mean nothing here, and one message is enough
            model.value = {"type": model.members["type"], "model_path": Node("unsupported", kind.origin)}


def _system(context: Context, system: Node) -> None:
    findings = context.findings
    lift(system, "config", findings, "`config` of a system is gone: its settings stand beside `type`")
    kind = system.members.get("type")
    if kind is not None and isinstance(kind.value, str) and canonical(kind, ("LocalSystem",)) is None:
        known = canonical(kind, OTHER_SYSTEMS) is not None
        fix = 'use "type": "LocalSystem"' if known else did_you_mean(kind.value, ("LocalSystem",))
        findings.error(
            f"`type`: this version runs on this machine only, not on {kind.value!r}", kind.origin, fix
        )
        kept = {"accelerators": system.members["accelerators"]} if "accelerators" in system.members else {}
        system.value = {"type": Node("LocalSystem", kind.origin)} | kept
    drop_all(system, SYSTEM_WITHOUT_EFFECT, findings)
    accelerators = system.members.get("accelerators")
    if accelerators is None:
        return
    for index, item in enumerate(accelerators.items):
        if isinstance(item.value, str):
            findings.note("an accelerator given as text is now an object with `device`", item.origin)
            accelerators.items[index] = item = Node({"device": Node(item.value, item.origin)}, item.origin)
        if isinstance(item.value, dict):
            _accelerator(context, item)


def _accelerator(context: Context, item: Node) -> None:
    drop_all(item, {"memory": "of an accelerator has no effect: memory is measured"}, context.findings)
    canonical(item.members.get("device"), get_args(Device))
    providers = item.members.get("execution_providers")
    if providers is not None and isinstance(providers.value, str):
        providers.value = [Node(providers.value, providers.origin)]
    for key in [key for key in item.members if item.members[key].value is None]:
        del item.members[key]
    for provider in providers.items if providers is not None else []:
        canonical(provider, get_args(ExecutionProvider))
    _infer_device(item)


def _infer_device(item: Node) -> None:
    """Write out the device that the first execution provider runs on, when none is given."""
    providers = item.members.get("execution_providers")
    if providers is None or not providers.items or any(_near(key, "device") for key in item.members):
        return
    item.value = {"device": Node(_device_of(str(providers.items[0].value)), providers.origin)} | item.members


def _near(key: str, name: str) -> bool:
    from olive.config.suggest import closest

    return key != "execution_providers" and closest(key, (name,)) is not None


def _device_of(provider: str) -> str:
    if provider in ("CPUExecutionProvider", "OpenVINOExecutionProvider"):
        return "cpu"
    return "npu" if provider in ("QNNExecutionProvider", "VitisAIExecutionProvider") else "gpu"


def _place(context: Context) -> None:
    """Give the engine's execution providers to the accelerators, and settle host and target."""
    root, findings = context.root, context.findings
    systems = section(root, "systems", {})
    providers = root.members.pop("execution_providers", None)
    if providers is not None and isinstance(providers.value, str):
        providers.value = [Node(providers.value, providers.origin)]
    if not systems.members:
        root.value.pop("systems", None)
    if providers is not None and providers.items:
        findings.note("`execution_providers` of the engine now stands in each accelerator", providers.origin)
        for provider in providers.items:
            canonical(provider, get_args(ExecutionProvider))
        if not systems.members:
            system: dict[str, Any] = {"type": Node("LocalSystem", providers.origin)}
            systems = root.value.setdefault(
                "systems", Node({"local_system": Node(system, providers.origin)}, ())
            )
        for system_node in systems.members.values():
            _give(system_node, providers)
    names = list(systems.members)
    if names and "local_system" not in names and root.members.get("host", Node(None, ())).value is None:
        target = root.members.get("target", Node(None, ())).value
        host = target if target in names else names[0] if len(names) == 1 else None
        if host is not None:
            findings.note(f"no `host` is given: passes run on `{host}`", root.origin)
            root.value["host"] = Node(host, root.origin)
        else:
            systems.value["local_system"] = Node({"type": Node("LocalSystem", root.origin)}, root.origin)
    if (
        names
        and "local_system" not in systems.members
        and root.members.get("target", Node(None, ())).value is None
    ):
        root.value["target"] = Node(root.members["host"].value, root.origin)


def _give(system: Node, providers: Node) -> None:
    if not isinstance(system.value, dict):
        return
    found = system.members.get("accelerators")
    if found is None or found.value in (None, []):
        device = _device_of(str(providers.items[0].value))
        found = Node([Node({"device": Node(device, providers.origin)}, providers.origin)], providers.origin)
        system.value["accelerators"] = found
    for item in found.items:
        if isinstance(item.value, dict) and "execution_providers" not in item.members:
            item.value["execution_providers"] = Node(
                [Node(part.value, part.origin) for part in providers.items], providers.origin
            )
            _infer_device(item)


def _tidy(root: Node) -> None:
    """Sections in the order of the reference; none that is empty."""
    order = [name for name in Workflow.model_fields if name in root.members]
    rest = [name for name in root.members if name not in order]
    root.value = {
        name: root.members[name]
        for name in (*order, *rest)
        if not (name in ("evaluators", "data_configs", "systems") and root.members[name].value in ([], {}))
    }
    for name in ("systems", "passes"):
        for entry in root.members.get(name, Node({}, ())).members.values():
            if "type" in entry.members:
                entry.value = {"type": entry.members["type"]} | entry.members
    for config in root.members.get("data_configs", Node([], ())).items:
        if isinstance(config.value, dict):
            first = [name for name in DataConfig.model_fields if name in config.members]
            config.value = {name: config.members[name] for name in first} | config.members
