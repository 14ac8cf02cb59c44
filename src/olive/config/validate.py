"""The rewritten document against the typed models: one problem a cause, in words, at its line."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from olive.config import dialects, dialects_data, dialects_passes
from olive.config.base import PassParams
from olive.config.positions import JsonPath
from olive.config.rewrite import Context, text
from olive.config.suggest import closest, did_you_mean
from olive.config.training_args import names as training_names
from olive.config.tree import Node
from olive.config.workflow import HfModel, OnnxModel, PassEntry, Workflow

_SHOULD: dict[str, str] = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "mapping_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_OLD_NAMES = dialects.OLD_NAMES | dialects_data.OLD_NAMES
Validate = Callable[[], Any]


def build(context: Context) -> tuple[Workflow | None, set[JsonPath]]:
    """The workflow, or None with every error reported; and the paths that are in error."""
    root = context.root
    broken: set[JsonPath] = set()
    if not isinstance(root.value, dict):
        context.findings.error(f"the document should be an object, not {text(root.plain())}", root.origin)
        return None, {()}
    entries = _passes(context, broken)

    def whole() -> Workflow:
        return Workflow.model_validate({**root.plain(), "passes": {}})

    def fields(path: JsonPath) -> Mapping[str, Any]:
        if path[:1] == ("input_model",):
            onnx = root.at(("input_model", "type")).value == "OnnxModel"
            return model_fields(OnnxModel if onnx else HfModel, path[1:])
        return model_fields(Workflow, path)

    workflow = _validated(context, (), whole, fields, broken)
    if workflow is None or entries is None or broken:
        return None, broken
    return Workflow.model_validate({**root.plain(), "passes": entries}), broken


def _passes(context: Context, broken: set[JsonPath]) -> dict[str, PassEntry] | None:
    section = context.root.members.get("passes")
    if section is None or section.value is None:
        context.root.members.pop("passes", None)
        return {}
    if not isinstance(section.value, dict):
        context.findings.error(f"`passes` should be an object, not {text(section.plain())}", section.origin)
        broken.add(("passes",))
        return None
    found: dict[str, PassEntry] = {}
    earlier: dict[str, Any] = {}
    for name, entry in section.value.items():
        made = _entry(context, name, entry, broken)
        if made is not None:
            found[name] = _inherit(made, earlier)
    return found if len(found) == len(section.value) else None


def _inherit(entry: PassEntry, earlier: dict[str, Any]) -> PassEntry:
    """Fill parameters left out from those of the passes before; ``earlier`` holds the last of each."""
    values = {name: getattr(entry.params, name) for name in type(entry.params).model_fields}
    update = {
        field: earlier[source]
        for field, source in entry.params.inherited().items()
        if values[field] is None and earlier.get(source) is not None
    }
    earlier.update({name: value for name, value in values.items() if value is not None})
    return entry.model_copy(update={"params": entry.params.model_copy(update=update)}) if update else entry


def _entry(context: Context, name: str, entry: Node, broken: set[JsonPath]) -> PassEntry | None:
    path: JsonPath = ("passes", name)
    if not isinstance(entry.value, dict):
        context.findings.error(f"a pass should be an object, not {text(entry.plain())}", entry.origin)
        broken.add(path)
        return None
    params = dialects_passes.params_type(context, entry)
    if params is None:  # reported by the rewrites
        broken.add(path)
        return None

    def made() -> PassParams:
        return params.model_validate(_without(entry, dialects_passes.ENTRY_KEYS))

    def fields(at: JsonPath) -> Mapping[str, Any]:
        found = dict(model_fields(params, at))
        return found | dict.fromkeys(dialects_passes.ENTRY_KEYS) if not at else found

    values = _validated(context, path, made, fields, broken)
    head = {key: entry.value[key].plain() for key in dialects_passes.ENTRY_KEYS if key in entry.value}
    stand_in = values if values is not None else PassParams()
    return _validated(
        context,
        path,
        lambda: PassEntry.model_validate({**head, "params": stand_in}),
        lambda at: model_fields(PassEntry, at),
        broken,
    )


def _without(node: Node, keys: Sequence[str]) -> dict[str, Any]:
    return {key: child.plain() for key, child in node.members.items() if key not in keys}


def _validated(
    context: Context,
    base: JsonPath,
    validate: Validate,
    fields: Callable[[JsonPath], Mapping[str, Any]],
    broken: set[JsonPath],
) -> Any:
    """Validate; a null where the default is meant is dropped and tried again; report what remains."""
    node = context.root.at(base)
    for _ in range(2):
        try:
            return validate()
        except ValidationError as error:
            details = error.errors(include_url=False)
            if not _drop_nulls(node, details, fields):
                break
    _report(context, base, node, details, fields, broken)
    return None


def _drop_nulls(
    node: Node, details: Iterable[ErrorDetails], fields: Callable[[JsonPath], Mapping[str, Any]]
) -> bool:
    dropped = False
    for path in {_path(node, detail) for detail in details}:
        parent = node.at(path[:-1]) if path else node
        key = path[-1] if path else None
        if isinstance(key, str) and key in parent.members and parent.members[key].value is None:
            field = fields(path[:-1]).get(key)
            if field is not None and not field.is_required():
                del parent.members[key]
                dropped = True
    return dropped


def _path(node: Node, detail: ErrorDetails) -> JsonPath:
    """The part of pydantic's location that is a path in the document; names of union members are left out."""
    path: list[str | int] = []
    for index, part in enumerate(detail["loc"]):
        child = node.child(part)
        if child is not None:
            node = child
            path.append(part)
        elif index == len(detail["loc"]) - 1 and detail["type"] == "missing":
            path.append(part)
    return tuple(path)


def _report(
    context: Context,
    base: JsonPath,
    node: Node,
    details: list[ErrorDetails],
    fields: Callable[[JsonPath], Mapping[str, Any]],
    broken: set[JsonPath],
) -> None:
    causes: dict[JsonPath, list[ErrorDetails]] = {}
    for detail in details:
        causes.setdefault(_path(node, detail), []).append(detail)
    unknown = {
        path: _suggestion(context, base, path, fields)
        for path, found in causes.items()
        if _is(found, "extra")
    }
    for path, found in causes.items():
        if path in unknown:
            _unknown(context, base, path, unknown[path], node.at(path))
        elif _deeper(path, causes) and (len(found[0]["loc"]) > len(path) or _is(found, "too_short")):
            continue  # what is wrong below is the cause: another member of a union got further
        elif _is(found, "missing"):
            if not _explained(path, unknown, fields):
                where = node.at(path[:-1]).origin
                context.findings.error(f"`{path[-1]}` is missing", (*where, str(path[-1])))
        else:
            _wrong(context, path, node.at(path), found)
        broken.add((*base, *path))


def _deeper(path: JsonPath, causes: Iterable[JsonPath]) -> bool:
    return any(other[: len(path)] == path and other != path for other in causes)


def _is(found: list[ErrorDetails], kind: str) -> bool:
    return found[0]["type"].startswith(kind)


def _explained(
    path: JsonPath, unknown: Mapping[JsonPath, str | None], fields: Callable[[JsonPath], Mapping[str, Any]]
) -> bool:
    """Whether a missing key is what an unknown one beside it was meant to be, or stands in an older one."""
    for other, meant in unknown.items():
        parent = other[:-1]
        if path[:-1] == parent and meant == path[-1]:
            return True
        if meant is not None and path[: len(parent)] == parent and meant not in fields(parent):
            return True
    return False


def _suggestion(
    context: Context, base: JsonPath, path: JsonPath, fields: Callable[[JsonPath], Mapping[str, Any]]
) -> str | None:
    return closest(str(path[-1]), _known(context, base, path, fields))


def _known(
    context: Context, base: JsonPath, path: JsonPath, fields: Callable[[JsonPath], Mapping[str, Any]]
) -> list[str]:
    parent = (*base, *path[:-1])
    known = list(fields(path[:-1]))
    if parent[:1] == ("passes",) and len(parent) == 2:
        kind = context.root.at((*parent, "type")).value
        aliases = dialects_passes.params_aliases(context.params_of(str(kind)))
        return [*known, *aliases, *dialects_passes.old_names(str(kind))]
    return [*known, *_OLD_NAMES.get(_pattern(parent), ())]


def _pattern(path: JsonPath) -> tuple[str, ...]:
    """A path with the names that people choose, and indices, as ``*``."""
    free = {("systems",), ("evaluators",), ("passes",)}
    return tuple(
        "*" if isinstance(part, int) or path[:index] in free else part for index, part in enumerate(path)
    )


def _unknown(context: Context, base: JsonPath, path: JsonPath, meant: str | None, node: Node) -> None:
    key = str(path[-1])
    if meant is not None:
        fix = f"did you mean `{meant}`?"
    else:
        parent = (*base, *path[:-1])
        fields = model_fields(Workflow, parent)
        fix = did_you_mean(key, fields) if fields else "remove it"
        if parent[:1] == ("passes",):
            in_training = key in training_names()
            fix = "move it into `training_args`" if in_training else "remove it, or see docs/config.md"
    context.findings.error(f"unknown key `{key}`", node.origin, fix)


def _wrong(context: Context, path: JsonPath, node: Node, found: list[ErrorDetails]) -> None:
    shown = text(node.plain())
    literal = next((detail for detail in found if detail["type"] in ("literal_error", "enum")), None)
    if literal is not None and isinstance(node.value, str):
        expected = str(literal.get("ctx", {}).get("expected", ""))
        choices = [part.strip().strip("'\"") for part in expected.replace(" or ", ", ").split(",")]
        context.findings.error(
            f"{shown} is none of {', '.join(choices)}", node.origin, _nearest(node.value, choices)
        )
        return
    wanted = list(dict.fromkeys(_SHOULD[detail["type"]] for detail in found if detail["type"] in _SHOULD))
    if wanted:
        context.findings.error(f"should be {' or '.join(wanted)}, not {shown}", node.origin)
        return
    message = found[0]["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be"):
        message = f"{shown} should be{message.removeprefix('Input should be')}"
    elif found[0]["type"] == "too_short":
        message = f"should hold at least {found[0].get('ctx', {}).get('min_length', 1)}, not {shown}"
    elif message.startswith("String should match pattern"):
        message = f"{shown} may hold letters, digits, dot, dash and underscore only"
    else:
        message = f"{shown}: {message}"
    context.findings.error(message, node.origin)


def _nearest(value: str, choices: list[str]) -> str | None:
    found = closest(value, choices)
    return f'did you mean "{found}"?' if found is not None else None


def model_fields(model: Any, path: JsonPath) -> Mapping[str, Any]:
    """The fields of the typed model at ``path`` below ``model``; none where there is no model."""
    for alternative in _alternatives(model):
        if isinstance(alternative, type) and issubclass(alternative, BaseModel):
            if not path:
                return alternative.model_fields
            field = alternative.model_fields.get(str(path[0]))
            if field is not None:
                return model_fields(field.annotation, path[1:])
        elif path and get_origin(alternative) is not None and get_args(alternative):
            arguments = get_args(alternative)
            found = model_fields(arguments[0] if isinstance(path[0], int) else arguments[-1], path[1:])
            if found:
                return found
    return {}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)
