"""`training_args`: the fields of the installed TrainingArguments, by their old and new names, and our own.

The fields are read from the source of transformers, not by importing it: importing takes seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from olive.config.rewrite import text
from olive.config.suggest import did_you_mean
from olive.config.tree import Findings, Node

RENAMED: dict[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
    "push_to_hub_model_id": "hub_model_id",
    "xpu_backend": "ddp_backend",
    "torchdynamo": "torch_compile_backend",
    "warmup_ratio": "warmup_steps",
    "early_stopping_steps": "early_stopping_patience",  # LLaMA-Factory's name for the same number
}
WITHOUT_EFFECT: dict[str, str] = {
    "output_dir": "of `training_args` has no effect: checkpoints live in the store",
    "overwrite_output_dir": "has no effect: checkpoints live in the store",
    "resume_from_checkpoint": "has no effect: an interrupted run continues by itself",
    "save_safetensors": "has no effect: weights are always written as safetensors",
    "logging_dir": "has no effect: curves are in the report; trackers write to `tracking` in output_dir",
    "fp16_backend": "has no effect any more",
    "half_precision_backend": "has no effect any more",
    "fp16_opt_level": "has no effect any more",
    "use_ipex": "has no effect any more",
    "use_mps_device": "has no effect any more: the device is found by itself",
    "jit_mode_eval": "has no effect any more",
    "past_index": "has no effect any more",
    "mp_parameters": "has no effect any more",
    "ray_scope": "has no effect here",
    "tpu_num_cores": "has no effect here",
    "tpu_metrics_debug": "has no effect here",
    "include_tokens_per_second": "has no effect: tokens per second are always reported",
    "local_rank": "has no effect in a document",
    "disable_tqdm": "has no effect: progress is shown where there is a terminal",
}
SPECIAL = ("group_by_length", "adafactor", "extra_args", "hub_token", "push_to_hub_token")
# name -> (lowest, highest), both allowed.
_RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-12, 10.0),
    "num_train_epochs": (1e-6, 1e5),
    "max_steps": (-1, 1e8),
    "per_device_train_batch_size": (1, 1 << 16),
    "per_device_eval_batch_size": (1, 1 << 16),
    "gradient_accumulation_steps": (1, 1 << 20),
    "adam_beta1": (0.0, 1 - 1e-9),
    "adam_beta2": (0.0, 1 - 1e-9),
    "adam_epsilon": (1e-30, 1.0),
    "weight_decay": (0.0, 100.0),
    "max_grad_norm": (0.0, 1e6),
    "warmup_steps": (0.0, 1e8),
    "label_smoothing_factor": (0.0, 1 - 1e-9),
    "logging_steps": (1e-6, 1e8),
    "eval_steps": (1e-6, 1e8),
    "save_steps": (1e-6, 1e8),
    "seed": (0, (1 << 32) - 1),
    "data_seed": (0, (1 << 32) - 1),
    "early_stopping_patience": (1, 1e6),
    "early_stopping_threshold": (0.0, 1e3),
}
_PRIMITIVES = {"int", "float", "str", "bool", "dict", "list", "None"}
_SAID = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "an object",
    "list": "a list",
    "None": "null",
}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of TrainingArguments.

    Attributes:
        kinds: names of the primitive types it takes.
        choices: the only values text may have; empty when any may.
    """

    kinds: frozenset[str]
    choices: tuple[str, ...] = ()


# Beside those of TrainingArguments: what transformers' EarlyStoppingCallback takes.
OWN: dict[str, Field] = {
    "early_stopping_patience": Field(frozenset({"int", "None"})),
    "early_stopping_threshold": Field(frozenset({"float", "None"})),
}


@cache
def fields() -> Mapping[str, Field]:
    """The fields of the installed TrainingArguments and our own; none when transformers is not installed."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    folder = Path(spec.origin).parent
    try:
        module = ast.parse((folder / "training_args.py").read_text(encoding="utf-8"))
        helpers = ast.parse((folder / "trainer_utils.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    enums = _enums(module) | _enums(helpers)
    found: dict[str, Field] = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and _is_field(line):
                    found[line.target.id] = _field(line, enums)
    return found | OWN


def names() -> tuple[str, ...]:
    """Every name a document may use, old ones last."""
    return (*fields(), *RENAMED, *SPECIAL)


def check(node: Node, findings: Findings) -> None:
    """Rewrite ``training_args`` to the installed names, and report what cannot be used.

    Args:
        node: the object; changed in place.
        findings: gets one problem a cause.
    """
    if not isinstance(node.value, dict):
        findings.error(f"{text(node.plain())} should be an object of training arguments", node.origin)
        return
    _translate(node, findings)
    known = fields()
    for key, child in list(node.members.items()):
        if not known:
            continue
        if key not in known:
            findings.error(f"unknown key `{key}` in training_args", child.origin, did_you_mean(key, names()))
        else:
            _check_value(key, known[key], child, findings)


def _translate(node: Node, findings: Findings) -> None:
    from olive.config.rewrite import drop, lift, rename

    known = fields()
    lift(node, "extra_args", findings, "`extra_args` is gone: its settings stand directly in `training_args`")
    for old, new in RENAMED.items():
        if old in known and new in known and old in node.members:
            continue  # an installed version that still has the old name as a field of its own
        if new in known or not known:
            rename(node, old, new, findings)
    for key, why in WITHOUT_EFFECT.items():
        drop(node, key, findings, why)
    members = node.members
    grouped = members.get("group_by_length")
    if grouped is not None and "group_by_length" not in known and isinstance(grouped.value, bool):
        del members["group_by_length"]
        value = "group_by_length" if grouped.value else "random"
        findings.note(f'`group_by_length` is now `train_sampling_strategy: "{value}"`', grouped.origin)
        members.setdefault("train_sampling_strategy", Node(value, grouped.origin))
    adafactor = members.get("adafactor")
    if adafactor is not None and "adafactor" not in known and isinstance(adafactor.value, bool):
        del members["adafactor"]
        findings.note('`adafactor` is now `optim: "adafactor"`', adafactor.origin)
        if adafactor.value:
            members.setdefault("optim", Node("adafactor", adafactor.origin))
    for key in ("hub_token", "push_to_hub_token"):
        token = members.pop(key, None)
        if token is not None and token.value is not None:
            findings.error(
                f"`{key}` is a secret and must not stand in a document",
                token.origin,
                "set HF_TOKEN in the environment",
            )


def _check_value(key: str, field: Field, node: Node, findings: Findings) -> None:
    value = node.plain()
    if (
        isinstance(value, float)
        and value.is_integer()
        and "float" not in field.kinds
        and "int" in field.kinds
    ):
        node.value = value = int(value)
    if _kind(value) not in field.kinds and not (_kind(value) == "int" and "float" in field.kinds):
        wanted = " or ".join(said for kind, said in _SAID.items() if kind in field.kinds and kind != "None")
        fix = "write the number without quotes" if isinstance(value, str) and _is_number(value) else None
        findings.error(f"`{key}` should be {wanted}, not {text(value)}", node.origin, fix)
        return
    if isinstance(value, str) and field.choices and value not in field.choices:
        fix = did_you_mean(value, field.choices)
        findings.error(f"`{key}`: {text(value)} is none of its values", node.origin, fix)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high = _RANGES.get(key, (-1e9, 1e9))
    if not low <= value <= high or abs(value) >= 1e9 * (1 + (key in ("seed", "data_seed")) * 4):
        findings.error(f"`{key}`: {value} is out of range", node.origin, f"between {low:g} and {high:g}")
    elif key == "max_steps" and value == 0:
        findings.error(
            "`max_steps`: 0 steps train nothing", node.origin, "at least 1, or -1 for `num_train_epochs`"
        )


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_field(line: ast.AnnAssign) -> bool:
    """Whether the line makes a field that the constructor takes."""
    call = line.value
    if not isinstance(call, ast.Call):
        return True
    return not any(
        word.arg == "init" and isinstance(word.value, ast.Constant) and word.value.value is False
        for word in call.keywords
    )


def _field(line: ast.AnnAssign, enums: Mapping[str, tuple[str, ...]]) -> Field:
    mentioned = {
        "None" if isinstance(part, ast.Constant) and part.value is None else _name(part)
        for part in _outer(line.annotation)
    }
    kinds = {name for name in mentioned if name in _PRIMITIVES}
    if "Optional" in mentioned:
        kinds.add("None")
    choices: tuple[str, ...] = ()
    for name in mentioned - _PRIMITIVES:
        kinds.add("str")
        choices = enums.get(name, ())
    return Field(frozenset(kinds), _choices(line) or choices)


def _outer(node: ast.expr) -> list[ast.expr]:
    """The alternatives of an annotation, without what stands in their brackets."""
    if isinstance(node, ast.BinOp):
        return [*_outer(node.left), *_outer(node.right)]
    if isinstance(node, ast.Subscript):
        name = _name(node.value)
        if name in ("Optional", "Union"):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            extra: list[ast.expr] = [ast.Constant(None)] if name == "Optional" else []
            return extra + [part for alternative in inner for part in _outer(alternative)]
        if name == "Literal":
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return [ast.Name(type(part.value).__name__) for part in inner if isinstance(part, ast.Constant)]
        return _outer(node.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _outer(ast.parse(node.value, mode="eval").body)
    return [node]


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return {"Dict": "dict", "List": "list"}.get(node.id, node.id)
    return node.attr if isinstance(node, ast.Attribute) else ""


def _enums(module: ast.Module) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for node in module.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in _name(base) for base in node.bases):
            found[node.name] = tuple(
                line.value.value
                for line in node.body
                if isinstance(line, ast.Assign)
                and isinstance(line.value, ast.Constant)
                and isinstance(line.value.value, str)
            )
    return found


def _choices(line: ast.AnnAssign) -> tuple[str, ...]:
    finder: Callable[[ast.AST], bool] = lambda part: isinstance(part, ast.Dict)  # noqa: E731
    for part in filter(finder, ast.walk(line)):
        if not isinstance(part, ast.Dict):
            continue
        for key, value in zip(part.keys, part.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                return tuple(
                    item.value
                    for item in value.elts
                    if isinstance(item, ast.Constant) and isinstance(item.value, str)
                )
    return ()
