"""JSON Schema of the document, for editors: completion, descriptions and red underlines."""

from __future__ import annotations

from typing import Any

from olive.config import training_args
from olive.config.base import PassParams
from olive.config.rewrite import ParamsOf
from olive.config.workflow import PassEntry, Workflow

_JSON_TYPES = {
    "int": "integer",
    "float": "number",
    "str": "string",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "None": "null",
}


def schema(params_of: ParamsOf, pass_names: tuple[str, ...]) -> dict[str, Any]:
    """The schema of today's spelling (draft 2020-12); parameters of a pass depend on its ``type``.

    Args:
        params_of: name of a pass -> type of its parameters.
        pass_names: the passes to describe.
    """
    found = Workflow.model_json_schema()
    definitions = found["$defs"]
    for name in ("PassEntry", "PassParams"):
        definitions.pop(name, None)
    entry = PassEntry.model_json_schema()
    common = {key: value for key, value in entry["properties"].items() if key in ("host", "evaluator")}
    for name in pass_names:
        definitions[f"pass.{name}"] = _pass(name, params_of(name), common, definitions)
    found["properties"]["passes"] = {
        "type": "object",
        "title": "Passes",
        "description": "The steps, in the order they run.",
        "additionalProperties": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": list(pass_names), "description": "Which pass."}},
            "allOf": [
                {
                    "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
                    "then": {"$ref": f"#/$defs/pass.{name}"},
                }
                for name in pass_names
            ],
        },
    }
    found["properties"]["$schema"] = {"type": "string", "description": "Where an editor finds this schema."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Olive workflow",
        **{key: value for key, value in found.items() if key != "title"},
    }


def _pass(
    name: str, params: type[PassParams], common: dict[str, Any], definitions: dict[str, Any]
) -> dict[str, Any]:
    found = params.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for inner, definition in found.pop("$defs", {}).items():
        definitions[f"{name}.{inner}"] = definition
    properties = found.get("properties", {})
    if "training_args" in properties and training_args.fields():
        properties["training_args"] |= {
            "properties": {key: _argument(field) for key, field in training_args.fields().items()},
            "additionalProperties": False,
        }
    found["title"] = name
    found["properties"] = {"type": {"const": name}, **common, **properties}
    found["required"] = ["type", *found.get("required", [])]
    found["additionalProperties"] = False
    return found


def _argument(field: training_args.Field) -> dict[str, Any]:
    kinds = sorted(_JSON_TYPES[kind] for kind in field.kinds)
    if field.choices and set(kinds) <= {"string", "null"}:
        return {"enum": [*field.choices, *([None] if "null" in kinds else [])]}
    return {"type": kinds[0] if len(kinds) == 1 else kinds}
