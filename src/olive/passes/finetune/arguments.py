"""From ``training_args`` to transformers' ``TrainingArguments``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.errors import ConfigError
from olive.passes.finetune.stopping import PATIENCE, THRESHOLD, Patience

# Olive's defaults where they differ from transformers'
_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "seed": 42,
    "data_seed": 42,
    "logging_nan_inf_filter": False,  # it asks a GPU for every loss at once
}
_OURS = {
    "output_dir": "the run's own output folder is used",
    "logging_dir": "curves go to run.json and report.html",
    "resume_from_checkpoint": "an interrupted run resumes by itself",
    "push_to_hub": "the result stays on this machine",
    "save_only_model": "checkpoints keep what resuming needs",
    "save_total_limit": "the newest two checkpoints are kept until the step is done",
    "do_train": "",
    "do_eval": "",
    "do_predict": "",
    "remove_unused_columns": "",
    "overwrite_output_dir": "",
    "auto_find_batch_size": "",
    "fsdp": "`devices` of the system says how many processes train, and how",
    "fsdp_config": "`devices` of the system says how many processes train, and how",
    "deepspeed": "it is not used: `devices` of the system says how many processes train, and how",
}
_OLD_NAMES = {"evaluation_strategy": "eval_strategy", "no_cuda": "use_cpu"}


def prepare(
    given: Mapping[str, Any], *, folder: Path, dtype: str, device: str, has_eval: bool
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of ``TrainingArguments``, and notes on what was set aside.

    Args:
        given: ``training_args`` of the document.
        folder: scratch folder; nothing of worth is written there.
        dtype: dtype of the base model.
        device: ``cpu`` or ``gpu``.
        has_eval: whether there are evaluation rows.
    """
    notes = []
    known: dict[str, Any] = dict(_DEFAULTS)
    for name, value in given.items():
        if name in _OURS:
            if _OURS[name] and value not in (None, False):
                notes.append(f"training_args.{name} is set aside: {_OURS[name]}")
            continue
        known[_OLD_NAMES.get(name, name)] = value
    if Patience.of(known) is not None:
        known.setdefault("load_best_model_at_end", True)
    if known.pop("group_by_length", None):
        known["train_sampling_strategy"] = "group_by_length"
    ratio = known.pop("warmup_ratio", None)
    if ratio and not known.get("warmup_steps"):
        known["warmup_steps"] = ratio
    if not has_eval:
        names = ("eval_strategy", "eval_steps", "eval_on_start", "load_best_model_at_end", PATIENCE)
        asked = [name for name in names if known.pop(name, None) not in (None, "no", False)]
        notes += [f"training_args.{name} is set aside: there are no evaluation rows" for name in asked]
    known["save_strategy"] = _save_strategy(given)
    if "eval_steps" in known and "eval_strategy" not in known:
        known["eval_strategy"] = "steps"
    known |= {
        "output_dir": str(folder),
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": device == "cpu",
        "use_cache": known.get("use_cache", False),
        "report_to": "none",  # trackers are told our curve, see tracking.py
    }
    if device != "cpu" and dtype == "float16" and not known.get("bf16"):
        known["fp16"] = True
    if device == "cpu":
        known.setdefault("dataloader_pin_memory", False)
    return known, notes


def _save_strategy(given: Mapping[str, Any]) -> str:
    if "save_strategy" in given:
        return str(given["save_strategy"])
    return "steps" if "save_steps" in given else "no"


def rows_of_a_step(given: Mapping[str, Any]) -> int:
    """Rows of an optimizer step, however many devices share them."""
    return int(given.get("per_device_train_batch_size") or 1) * int(
        given.get("gradient_accumulation_steps") or 1
    )


def timed_saves(given: Mapping[str, Any]) -> bool:
    """Whether checkpoints are made by the clock, since the document does not say when."""
    return "save_strategy" not in given and "save_steps" not in given


def build(known: Mapping[str, Any]) -> Any:
    """The ``TrainingArguments``. The best state is kept as it comes up, whenever checkpoints are written.

    Raises:
        ConfigError: a name or a value the installed transformers does not take.
    """
    from dataclasses import fields
    from difflib import get_close_matches

    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments) if field.init}
    kept = {name: value for name, value in known.items() if name in names}
    missing = [name for name in known if name not in names and name not in ("use_cache", PATIENCE, THRESHOLD)]
    if missing:
        close = get_close_matches(missing[0], sorted(names), n=1)
        raise ConfigError(
            f"training_args has no {', '.join(missing)} in the installed transformers",
            fix=f"did you mean {close[0]}?" if close else "remove it",
        )
    best = kept.pop("load_best_model_at_end", False)
    if best:
        kept.setdefault("metric_for_best_model", "eval_loss")
    try:
        args = TrainingArguments(**kept)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training_args: {error}", fix="correct the value") from error
    args.load_best_model_at_end = bool(best)
    return args
