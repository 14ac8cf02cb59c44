"""Older spellings of the passes."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices

from olive.config import dialects_graphs, training_args
from olive.config.base import PassParams
from olive.config.rewrite import (
    Context,
    canonical,
    drop,
    drop_all,
    given,
    hoist,
    lift,
    normalise_dtype,
    rename_all,
    section,
    text,
)
from olive.config.suggest import closest, did_you_mean
from olive.config.tree import Node

ENTRY_KEYS = ("type", "host", "evaluator")
TYPES_RENAMED: dict[str, str] = {
    "genaimodelexporter": "ModelBuilder",
    "mergeloraweights": "MergeAdapterWeights",
    "gptqquantizer": "Gptq",
    "gptqmodel": "Gptq",
    "autoawqquantizer": "Awq",
}
TUNING = ("LoRA", "QLoRA", "DoRA", "LoHa", "LoKr", "LoftQ")
RENAMED: dict[str, dict[str, str]] = {kind: {"lora_r": "r", "lora_alpha": "alpha"} for kind in TUNING} | {
    "Awq": {"q_group_size": "group_size", "w_bit": "bits"}
}
NEVER_LORA = "never had a meaning on LoRA; it belongs to QLoRA"
ENTRY_WITHOUT_EFFECT: dict[str, str] = {
    "disable_search": "has no effect: there is no search in this version",
    "clean_run_cache": "has no effect: entries are found by their content",
    "output_name": "of a pass has no effect: the result stands in `output_dir`",
    "run_on_target": "has no effect: a pass runs on its `host`",
    "reuse_cache": "has no effect: what exists is always used again",
    "save_as_external_data": "has no effect: large weights are always stored beside the graph",
    "all_tensors_to_one_file": "has no effect: weights are stored in one file",
    "external_data_name": "has no effect: the name is chosen by the exporter",
    "convert_attribute": "has no effect",
}
_TUNING_WITHOUT_EFFECT: dict[str, str] = {
    "use_ort_trainer": "has no effect: training runs on PyTorch",
    "ephemeral_gpu_offload": "has no effect in this version",
    "save_quant_config": "has no effect: the adapter says what its base was rounded to",
    "allow_tf32": "has no effect: TF32 is used where the device has it",
    "user_script": "has no effect: no code of your own runs here",
    "script_dir": "has no effect: no code of your own runs here",
}
_LAYERS_FOUND = "has no effect: layers are found in the model"
_QUANTISERS_WITHOUT_EFFECT: dict[str, str] = {
    "static_groups": "has no effect: groups are always fixed before the columns are rounded",
    "true_sequential": "has no effect: layers are always quantised in the order they run",
    "damp_auto_increment": "has no effect: damping grows by itself where it must",
    "layers_block_name": _LAYERS_FOUND,
    "outside_layer_modules": _LAYERS_FOUND,
    "inside_layer_modules": _LAYERS_FOUND,
    "mse": "has no effect: grids are always searched",
    "device": "has no effect: the `host` says where a pass runs",
    "version": "has no effect: there is one layout",
    "export_compatible": "has no effect: what is made can always be exported",
    "duo_scaling": "has no effect: the scale is searched by the energy of the inputs",
    "input_model_dtype": "has no effect: weights are quantised in float32",
    "user_script": "has no effect: no code of your own runs here",
    "script_dir": "has no effect: no code of your own runs here",
}
_GRAPHS_WITHOUT_EFFECT: dict[str, str] = {
    "size_threshold": "has no effect: weights of a kilobyte and more are stored beside the graph",
    "axis": "has no effect: blocks lie along the inputs of a product, as its operator reads them",
}
_OF_INTEGERS = ("OnnxDynamicQuantization", "OnnxStaticQuantization", "OnnxQuantization")
_ON_GRAPHS = (
    *("OnnxBlockWiseRtnQuantization", "OnnxKQuantQuantization", "OnnxHqqQuantization"),
    *("OnnxBnb4Quantization", "MatMulNBitsToQDQ"),
)
WITHOUT_EFFECT: dict[str, dict[str, str]] = dict.fromkeys(TUNING, _TUNING_WITHOUT_EFFECT) | {
    "LoRA": _TUNING_WITHOUT_EFFECT
    | dict.fromkeys(("double_quant", "quant_type", "compute_dtype", "save_quant_config"), NEVER_LORA),
    "Gptq": _QUANTISERS_WITHOUT_EFFECT,
    "Awq": _QUANTISERS_WITHOUT_EFFECT,
    "SpinQuant": dict.fromkeys(
        ("a_bits", "a_symmetric", "a_per_token"), "has no effect: activations stay in floating point"
    ),
}
WITHOUT_EFFECT |= dict.fromkeys(_ON_GRAPHS, _GRAPHS_WITHOUT_EFFECT)
WITHOUT_EFFECT["OnnxFloatToFloat16"] = {
    "use_symbolic_shape_infer": "has no effect: types follow from the operators' schemas"
}
# What a setting meant when Olive 0.6 and earlier were not told otherwise; written out where it differs today.
OLD_DEFAULTS: dict[str, dict[str, Any]] = {
    kind: {"r": 64, "alpha": 16, "lora_dropout": 0.0} for kind in TUNING
}
OLD_TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "learning_rate": 0.0002,
    "lr_scheduler_type": "constant",
}
OLD_MAX_STEPS = 10_000


def old_names(kind: str) -> tuple[str, ...]:
    """Keys that only older documents have on this pass: candidates for "did you mean"."""
    return (
        *ENTRY_KEYS,
        "config",
        *RENAMED.get(kind, {}),
        *WITHOUT_EFFECT.get(kind, {}),
        *ENTRY_WITHOUT_EFFECT,
    )


def params_aliases(params: type[PassParams]) -> dict[str, str]:
    """Other names that the pass itself accepts for its parameters -> the name of the parameter."""
    return {
        other: name
        for name, field in params.model_fields.items()
        if isinstance(field.validation_alias, AliasChoices)
        for other in field.validation_alias.choices
        if isinstance(other, str) and other != name
    }


def rewrite_passes(context: Context) -> None:
    """Every pass to today's spelling: `type`, `host`, `evaluator` and flat parameters."""
    passes = context.root.members.get("passes")
    for name, entry in list((passes.members if passes is not None else {}).items()):
        if len(entry.items) == 1:
            context.findings.note("a list with one pass is now the pass itself", entry.origin)
            entry.value = entry.items[0].value
        if isinstance(entry.value, dict):
            _pass(context, name, entry)


def params_type(context: Context, entry: Node) -> type[PassParams] | None:
    """Type of the parameters of a pass whose `type` is known, else None."""
    kind = entry.members.get("type")
    if kind is None or canonical(kind, context.pass_names) is None:
        return None
    return context.params_of(str(kind.value))


def _pass(context: Context, name: str, entry: Node) -> None:
    findings, root = context.findings, context.root
    lift(entry, "config", findings, "`config` of a pass is gone: its parameters stand beside `type`")
    if not _type(context, entry):
        return
    kind = str(entry.members["type"].value)
    if kind == "SpinQuant":
        _learned_rotation(context, entry)
    params = context.params_of(kind)
    known = params.model_fields
    names = params_aliases(params)
    names |= {old: new for old, new in RENAMED.get(kind, {}).items() if new in known and old not in known}
    new_spelling = (
        bool(set(names.values()) & entry.members.keys()) and not names.keys() & entry.members.keys()
    )
    rename_all(entry, names, findings)
    reasons = ENTRY_WITHOUT_EFFECT | WITHOUT_EFFECT.get(kind, {})
    drop_all(entry, {key: why for key, why in reasons.items() if key not in known}, findings)
    bias = entry.members.get("bias")
    if bias is not None and bias.value == "none" and kind in TUNING and "bias" not in known:
        drop(entry, "bias", findings, '"none" is the default: no bias is trained')
    hoist(entry, "evaluator", section(root, "evaluators", {}), f"{name}_evaluator", findings, "an evaluator")
    hoist(entry, "host", section(root, "systems", {}), f"{name}_system", findings, "a `host` system")
    for field, target in params.references().items():
        if target == "data_configs":
            hoist(
                entry, field, section(root, "data_configs", []), f"{name}_{field}", findings, "a data config"
            )
    _search_values(context, entry)
    if kind in _OF_INTEGERS:
        dialects_graphs.integers(context, entry)
    arguments = entry.members.get("training_args")
    if "training_args" in known and arguments is not None and arguments.value is not None:
        training_args.check(arguments, findings)
    if context.old and not new_spelling:
        _old_defaults(context, entry, kind, params)
    for field in ("torch_dtype", "dtype"):
        if field in known:
            normalise_dtype(findings, entry, field)


def _type(context: Context, entry: Node) -> bool:
    """Settle which pass this is; False when that is not known, which has been reported."""
    findings, kind = context.findings, entry.members.get("type")
    if kind is None:
        near = next((key for key in entry.members if closest(key, ("type",)) and key not in ENTRY_KEYS), None)
        if near is not None:
            findings.error(f"unknown key `{near}`", entry.members[near].origin, "did you mean `type`?")
        else:
            fix = f"one of {', '.join(context.pass_names)}"
            findings.error("`type` is missing: it says which pass this is", entry.origin, fix)
        return False
    if not isinstance(kind.value, str):
        findings.error(f"`type` should be the name of a pass, not {text(kind.plain())}", kind.origin)
        return False
    new = TYPES_RENAMED.get(kind.value.lower())
    if kind.value.lower() == dialects_graphs.MATMUL4:
        new = dialects_graphs.matmul4(context, entry)
        if new is None:
            return False
    if new in context.pass_names and canonical(kind, context.pass_names) is None:
        findings.note(f"`{kind.value}` is now `{new}`", kind.origin)
        if new in ("Gptq", "Awq"):
            _older_quantiser(context, entry)
        kind.value = new
    if canonical(kind, context.pass_names) is None:
        fix = did_you_mean(kind.value, context.pass_names)
        findings.error(f"this version has no pass called {kind.value!r}", kind.origin, fix)
        return False
    return True


def _older_quantiser(context: Context, entry: Node) -> None:
    """`zero_point` is the opposite of `sym`; blocks of 128 were the default."""
    old = entry.members.get("zero_point")
    if old is not None and isinstance(old.value, bool):
        context.findings.note("`zero_point` is now `sym`, its opposite", old.origin)
        del entry.value["zero_point"]
        entry.value["sym"] = Node(not old.value, old.origin)
    if not any(given(entry, key) for key in ("group_size", "q_group_size")):
        context.findings.note("not given, so kept as it was: group_size 128", entry.origin)
        entry.value["group_size"] = Node(128, entry.origin)


def _learned_rotation(context: Context, entry: Node) -> None:
    """Of `training_args` only the number of steps has a meaning; activations below 16 bits are refused."""
    findings, bits = context.findings, entry.members.get("a_bits")
    if bits is not None and isinstance(bits.value, int) and bits.value < 16:
        findings.error(
            f"activations of {bits.value} bits are not quantised in this version",
            bits.origin,
            "remove `a_bits`: weights alone are rounded",
        )
    arguments = entry.members.get("training_args")
    if arguments is None or not isinstance(arguments.value, dict | None):
        return
    for key in list(arguments.members):
        steps = arguments.members[key].value
        if key == "max_steps" and isinstance(steps, int) and steps > 0 and "iters" not in entry.members:
            findings.note("`max_steps` is now `iters` of the pass", arguments.members[key].origin)
            entry.value["iters"] = Node(steps, arguments.members[key].origin)
        else:
            drop(
                arguments,
                key,
                findings,
                "has no effect on SpinQuant: `iters` are its steps, `lr` is the angle of the first, "
                "`batch_tokens` the tokens of each",
            )
    del entry.value["training_args"]


def _search_values(context: Context, entry: Node) -> None:
    for key, child in list(entry.members.items()):
        if child.value in ("DEFAULT_VALUE", "DEFAULT_SEARCH_VALUE"):
            context.findings.note(f'"{child.value}" is what a missing key means', child.origin)
            del entry.members[key]
        elif child.value == "SEARCHABLE_VALUES":
            context.findings.error(
                f"`{key}` is to be searched, but this version runs the passes with the parameters given",
                child.origin,
                "give one value",
            )
            del entry.members[key]


def _old_defaults(context: Context, entry: Node, kind: str, params: type[PassParams]) -> None:
    findings, kept = context.findings, []
    for key, value in OLD_DEFAULTS.get(kind, {}).items():
        if (
            key not in entry.members
            and key in params.model_fields
            and params.model_fields[key].default != value
        ):
            entry.value[key] = Node(value, entry.origin)
            kept.append(f"{key} {value}")
    if kind in TUNING and "training_args" in params.model_fields:
        arguments = entry.value.setdefault("training_args", Node({}, entry.origin))
        if arguments.value is None:
            arguments.value = {}
        if isinstance(arguments.value, dict):
            for key, value in OLD_TRAINING_DEFAULTS.items():
                if not given(arguments, key):
                    arguments.value[key] = Node(value, arguments.origin)
                    kept.append(f"{key} {value}")
            _old_steps(context, arguments, kept)
    if kept:
        findings.note(f"not given, so kept as Olive 0.6 had them: {', '.join(kept)}", entry.origin)


def _old_steps(context: Context, arguments: Node, kept: list[str]) -> None:
    if given(arguments, "max_steps"):
        return
    if not given(arguments, "num_train_epochs"):
        arguments.value["max_steps"] = Node(OLD_MAX_STEPS, arguments.origin)
        kept.append(f"max_steps {OLD_MAX_STEPS}")
    else:
        context.findings.warn(
            f"no `max_steps` is given: `num_train_epochs` decides; Olive 0.6 trained {OLD_MAX_STEPS} steps",
            arguments.members["num_train_epochs"].origin,
            "set `max_steps` to have it explicit",
        )
