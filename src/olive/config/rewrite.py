"""The few moves that every rewrite is made of, each of which says what it did."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from olive.config.base import PassParams
from olive.config.tree import Findings, Node

ParamsOf = Callable[[str], type[PassParams]]


@dataclass(slots=True)
class Context:
    """What the rewrites of one document share.

    Attributes:
        root: the document; rewritten in place.
        findings: where each rewrite is told.
        old: whether the document is in the spelling of Olive 0.6 and earlier, whose defaults then hold.
        params_of: pass name -> type of its parameters.
        pass_names: every pass a document may name.
    """

    root: Node
    findings: Findings
    old: bool
    params_of: ParamsOf
    pass_names: tuple[str, ...]


def text(value: Any) -> str:
    """A value as it would be written, shortened."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def rename(node: Node, old: str, new: str, findings: Findings, note: str | None = None) -> None:
    """Give the member ``old`` the name ``new``, in its place."""
    members = node.members
    if old not in members:
        return
    if new in members:
        if members[old].plain() != members[new].plain():
            findings.error(
                f"`{old}` is the older name of `{new}`, and both are given: "
                f"{text(members[old].plain())} and {text(members[new].plain())}",
                members[old].origin,
                f"keep only `{new}`",
            )
        del members[old]
        return
    findings.note(note or f"`{old}` is now `{new}`", members[old].origin)
    node.value = {new if key == old else key: child for key, child in members.items()}


def rename_all(node: Node, names: Mapping[str, str], findings: Findings) -> None:
    """Several renames."""
    for old, new in names.items():
        rename(node, old, new, findings)


def given(node: Node, key: str) -> bool:
    """Whether the member is there and not null."""
    return key in node.members and node.members[key].value is not None


def drop(node: Node, key: str, findings: Findings, why: str) -> Node | None:
    """Remove a member that has no effect; ``why`` ends the sentence "`key` ..."."""
    found = node.members.pop(key, None)
    if found is not None and found.value is not None:
        findings.note(f"`{key}` {why}", found.origin)
    return found


def drop_all(node: Node, reasons: Mapping[str, str], findings: Findings) -> None:
    """Several drops."""
    for key, why in reasons.items():
        drop(node, key, findings, why)


def lift(node: Node, key: str, findings: Findings, note: str) -> None:
    """Put the members of the object ``key`` directly into ``node``."""
    inner = node.members.get(key)
    if inner is None:
        return
    if inner.value is not None and not isinstance(inner.value, dict):
        findings.error(f"{text(inner.plain())} should be an object", inner.origin)
        del node.members[key]
        return
    if inner.members:
        findings.note(note, inner.origin)
    merged: dict[str, Node] = {}
    for name, child in node.members.items():
        if name != key:
            merged[name] = child
            continue
        for inner_name, inner_child in inner.members.items():
            if inner_name == key or inner_name not in node.members:
                merged[inner_name] = inner_child
            elif inner_child.plain() != node.members[inner_name].plain():
                findings.error(
                    f"`{inner_name}` is given twice: here and beside `{key}`",
                    inner_child.origin,
                    "keep one of them",
                )
    node.value = merged


def canonical(node: Node | None, names: Iterable[str]) -> str | None:
    """Write a name as it is registered, whatever its case; return it when it is known."""
    if node is None or not isinstance(node.value, str):
        return None
    found = {name.lower(): name for name in names}.get(node.value.lower())
    if found is not None:
        node.value = found
    return found


def hoist(node: Node, key: str, section: Node, name: str, findings: Findings, what: str) -> None:
    """Move an object written in place of a name into ``section``, under a free name."""
    inline = node.members.get(key)
    if inline is None or not isinstance(inline.value, dict):
        return
    own = inline.members.get("name")
    if own is not None and isinstance(own.value, str):
        name = own.value
    present = {str(item.members["name"].value): item for item in section.items if "name" in item.members}
    present |= section.members
    free, number = name, 2
    while free in present and present[free].plain() != inline.plain():
        free, number = f"{name}_{number}", number + 1
    if isinstance(section.value, dict):
        section.value.setdefault(free, Node(inline.value, inline.origin))
    elif free not in present:
        section.value.append(Node(inline.members | {"name": Node(free, inline.origin)}, inline.origin))
    findings.note(f"{what} written in place of a name is now `{free}` in its own section", inline.origin)
    node.members[key] = Node(free, inline.origin)


def section(root: Node, name: str, empty: Any) -> Node:
    """The section ``name``, made when it is absent; a throw-away one when it has the wrong form."""
    found = root.members.get(name)
    if found is None or found.value is None:
        found = Node(empty, (name,))
        if isinstance(root.value, dict):
            root.value[name] = found
    return found if isinstance(found.value, type(empty)) else Node(empty, found.origin)


def normalise_dtype(findings: Findings, node: Node, key: str) -> None:
    """Write a dtype as ``float32``, ``float16`` or ``bfloat16``; ``auto`` means the default."""
    found = node.members.get(key)
    if found is None or not isinstance(found.value, str):
        return
    written = found.value
    value = written.lower().removeprefix("torch.")
    value = {
        "fp32": "float32",
        "float": "float32",
        "fp16": "float16",
        "half": "float16",
        "bf16": "bfloat16",
    }.get(value, value)
    if value == "auto":
        findings.note(f'`{key}: "auto"` is the default', found.origin)
        del node.members[key]
    elif value != written and value in ("float32", "float16", "bfloat16"):
        findings.note(f'`{key}: "{written}"` is now "{value}"', found.origin)
        found.value = value
