"""``docs/config.md`` and ``docs/olive-config.schema.json``, made from the typed models.

``python -m olive.config.docs olive.passes.registry docs`` writes both. The module that knows the passes is an
argument, because this room imports none of the rooms above it.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from olive.config import dialects, dialects_data, dialects_passes, gates, training_args, workflow
from olive.config.base import PassParams
from olive.config.rewrite import ParamsOf
from olive.config.schema import schema

_INTRO = """\
# The workflow document

One document, JSON or YAML, says what to start from, what to do with it, and where. This page is generated
from the typed models by `python -m olive.config.docs olive.passes.registry docs`. Editors get the same from
[`olive-config.schema.json`](olive-config.schema.json): name it under the key `$schema` of the document.

Every object is closed: an unknown key at any depth is an error with its line and the name that was probably
meant. Names of types, devices and execution providers may be written in any case. `null` means the default.
Relative paths are looked up in the current folder. Documents written for Olive 0.4 to 0.13 load as they are:
each older spelling is reported once and keeps its meaning, defaults included, and `olive config migrate FILE`
writes today's spelling.
"""
_SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Top level", "", workflow.Workflow),
    ("`input_model`, type `HfModel`", "The model to start from.", workflow.HfModel),
    ("`input_model.load_kwargs`", "", workflow.LoadKwargs),
    ("`input_model`, type `OnnxModel`", "The same, of a graph.", workflow.OnnxModel),
    (
        "`systems.*`",
        "Where a pass runs (`host`) and what the result is for (`target`).",
        workflow.LocalSystem,
    ),
    ("`systems.*.accelerators[]`", "", workflow.Accelerator),
    ("`data_configs[]`", "A named dataset.", workflow.DataConfig),
    ("`data_configs[].mix[]`", "", workflow.MixPart),
    ("`data_configs[].load_dataset_config`", "", workflow.LoadDataset),
    ("`data_configs[].pre_process_data_config`", "", workflow.PreProcess),
    ("`data_configs[].dataloader_config`", "", workflow.Dataloader),
    ("`evaluators.*`", "", workflow.Evaluator),
    ("`evaluators.*.metrics[]`", "", workflow.Metric),
    ("`evaluators.*.metrics[].sub_types[]`", "", workflow.SubMetric),
    ("`evaluators.*.metrics[].sub_types[].goal`", "", workflow.Goal),
    ("`gates`", "Checks between stages, on unless switched off.", gates.Gates),
    ("`gates.merge`", "", gates.MergeGate),
    ("`gates.parity`", "", gates.ParityGate),
    ("`gates.bundle`", "", gates.BundleGate),
    ("`gates.integers`", "", gates.IntegersGate),
    ("`gates.graph`", "", gates.GraphGate),
    ("`gates.equivalence`", "", gates.EquivalenceGate),
)


def reference(params_of: ParamsOf, pass_names: tuple[str, ...]) -> str:
    """The reference page, as Markdown.

    Args:
        params_of: name of a pass -> type of its parameters.
        pass_names: the passes to describe.
    """
    lines = [_INTRO]
    for title, text, model in _SECTIONS:
        lines += [f"## {title}", "", *([text, ""] if text else []), *_table(model), ""]
    lines += ["## `passes.*`", "", "The steps, in the order they run. Each has:", ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += ["| `type` | text | required | which pass |"]
    lines += ["| `host` | text | the document's `host` | system it runs on |"]
    lines += ["| `evaluator` | text | none | evaluator to run on this step's result |", ""]
    for name in pass_names:
        params = params_of(name)
        lines += [f"### `{name}`", "", *([_doc(params), ""] if _doc(params) else []), *_table(params), ""]
        if "training_args" in params.model_fields:
            lines += [*_arguments(), ""]
    return "\n".join([*lines, *_older()]).rstrip() + "\n"


def _doc(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _table(model: type[BaseModel]) -> Iterator[str]:
    if not model.model_fields:
        yield "No parameters."
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        yield f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _type(field: FieldInfo) -> str:
    limits = " ".join(str(part) for part in map(_limit, field.metadata) if part)
    return _cell(_say(field.annotation) + (f" ({limits})" if limits else ""))


def _limit(part: Any) -> str:
    for name, sign in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        if hasattr(part, name):
            return f"{sign} {getattr(part, name)}"
    return ""


_NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    type(None): "null",
    Any: "any",
}


def _say(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _say(get_args(annotation)[0])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_say(part) for part in arguments if part is not type(None)))
    if origin in (tuple, list):
        return f"list of {_say(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"object of {_say(arguments[1])}" if arguments else "object"
    if isinstance(annotation, type) and issubclass(annotation, (BaseModel, PassParams)):
        return "object"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, tuple) and not isinstance(value[0], BaseModel):
        return _json(list(value))
    return "see below" if isinstance(value, (BaseModel, Mapping, tuple)) else _json(value)


def _json(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _arguments() -> Iterator[str]:
    names = sorted(set(training_args.fields()) - set(training_args.OWN))
    yield "`training_args` takes every field of the installed `transformers.TrainingArguments`:"
    yield ", ".join(f"`{name}`" for name in names) + "."
    yield ""
    yield "And `early_stopping_patience`: training ends after that many evaluations in a row whose"
    yield "`eval_loss` is not lower by more than `early_stopping_threshold` (0) than the lowest before; the"
    yield "state with the lowest is saved, as with `load_best_model_at_end`. It needs evaluation rows"
    yield "(`eval_dataset_size` or `eval_data_config`) and `eval_strategy`."


def _older() -> Iterator[str]:
    yield "## Older spellings"
    yield ""
    yield "| written for Olive 0.4 to 0.12 | today |"
    yield "|---|---|"
    yield "| `engine: {...}` | its settings at the top level |"
    yield "| `engine.execution_providers` | `execution_providers` of each accelerator |"
    yield "| `type` with `config: {...}` (model, systems, passes) | settings beside `type` |"
    yield '| `accelerators: ["gpu"]` | `accelerators: [{"device": "gpu"}]` |'
    yield "| `data_configs: {name: {...}}` | a list; each has its `name` |"
    yield "| `params_config`, `component_kwargs`, `params: {...}` | settings directly in `..._config` |"
    yield "| `PyTorchModel` with `hf_config` | `HfModel` |"
    renamed = dialects.MODEL_RENAMED | dialects_data.PARTS | dialects_data.PRE_RENAMED
    for names in dialects_passes.RENAMED.values():
        renamed = renamed | names
    for old, new in (renamed | training_args.RENAMED).items():
        yield f"| `{old}` | `{new}` |"
    yield '| `group_by_length: true` | `train_sampling_strategy: "group_by_length"` |'
    yield ""
    yield "Accepted, with a note that it has no effect:"
    yield ""
    tables = [dialects.ENGINE_WITHOUT_EFFECT, dialects.MODEL_WITHOUT_EFFECT, dialects.LOAD_WITHOUT_EFFECT]
    tables += [dialects.SYSTEM_WITHOUT_EFFECT, dialects_data.PRE_WITHOUT_EFFECT]
    tables += [dialects_data.METRIC_WITHOUT_EFFECT, dialects_passes.ENTRY_WITHOUT_EFFECT]
    tables += [*dialects_passes.WITHOUT_EFFECT.values(), training_args.WITHOUT_EFFECT]
    ignored = sorted({name for table in tables for name in table} | {"dataset_type"})
    yield ", ".join(f"`{name}`" for name in ignored) + "."


def main(arguments: list[str]) -> int:
    """Write both files: ``TABLE FOLDER``, the module with ``names`` and ``params_of``, and where to write."""
    if len(arguments) != 2:
        print("usage: python -m olive.config.docs TABLE FOLDER", file=sys.stderr)
        return 2
    table, folder = importlib.import_module(arguments[0]), Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.md").write_text(reference(table.params_of, table.names()), encoding="utf-8")
    text = json.dumps(schema(table.params_of, table.names()), indent=2, ensure_ascii=False)
    (folder / "olive-config.schema.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
