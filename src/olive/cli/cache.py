"""``olive cache ls | explain | verify | gc``."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from olive.cli.arguments import Parser, UsageError, byte_count, seconds

if TYPE_CHECKING:
    from olive.engine.plan import Plan
    from olive.models.artifact import Artifact
    from olive.store.store import Entry, Store


def _configure(parser: Parser) -> None:
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="the cache (default: .olive-cache, or the document's)"
    )
    parser.add_argument("--config", metavar="FILE", help="take cache_dir from this document")


def _store(args: argparse.Namespace) -> Store:
    from pathlib import Path

    from olive.store.store import Store

    root = Path(args.cache_dir or ".olive-cache")
    if args.config and not args.cache_dir:
        from olive.workflows import load

        loaded = load(args.config)
        root = loaded.base_dir / loaded.workflow.cache_dir
    if not root.is_dir():
        raise UsageError(f"there is no cache at {root}; name one with --cache-dir DIR or --config FILE")
    return Store(root)


def configure_ls(parser: Parser) -> None:
    """What ``olive cache ls`` takes."""
    _configure(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")


def ls(args: argparse.Namespace) -> int:
    """List stored results and statistics, newest first."""
    from olive.report.console import columns, relative
    from olive.report.figures import duration, size

    store = _store(args)
    entries = sorted(_entries(store), key=lambda entry: -entry.created)
    if args.json:
        print(json.dumps([_facts(entry) for entry in entries], indent=2))
        return 0
    rows = [["key", "step", "made", "size", "took", "last used"]]
    for entry in entries:
        took = entry.meta.get("seconds")
        rows.append(
            [
                entry.key[:12],
                str(entry.meta.get("step") or entry.meta.get("type", "–")),
                str(entry.meta.get("kind", "–")),
                size(entry.size),
                duration(took) if isinstance(took, (int, float)) else "–",
                _ago(entry.used),
            ]
        )
    if entries:
        print("\n".join(columns(rows, indent="")))
    total = sum(entry.size for entry in entries)
    print(f"{_counted(entries)}, {size(total)} in {relative(store.root)}")
    return 0


def _entries(store: Store) -> list[Entry]:
    """Results and statistics."""
    return [entry for area in store.areas() for entry in area.entries()]


def _counted(entries: list[Entry]) -> str:
    statistics = sum(entry.meta.get("type") == "statistics" for entry in entries)
    return f"{len(entries) - statistics} results" + (f", {statistics} statistics" if statistics else "")


def _facts(entry: Entry) -> dict[str, Any]:
    from olive.report.redact import tree

    facts: dict[str, Any] = tree(
        {
            "key": entry.key,
            "step": entry.meta.get("step"),
            "type": entry.meta.get("type"),
            "kind": entry.meta.get("kind"),
            "size": entry.size,
            "digest": entry.digest,
            "created": entry.created,
            "used": entry.used,
            "path": str(entry.path),
        }
    )
    return facts


def _ago(moment: float) -> str:
    passed = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed / length:.0f} {unit} ago"
    return "just now"


def configure_explain(parser: Parser) -> None:
    """What ``olive cache explain`` takes."""
    parser.add_argument("keys", nargs="*", metavar="KEY", help="one key: its parts; two: how they differ")
    _configure(parser)


def explain(args: argparse.Namespace) -> int:
    """Say what a key was made of, how two differ, or why the steps of a document hit or miss."""
    from olive.store.keys import difference

    if not args.keys:
        if not args.config:
            raise UsageError("olive cache explain takes one KEY, two, or --config FILE")
        return _explain_document(args)
    if len(args.keys) > 2:
        raise UsageError("olive cache explain takes at most two keys")
    store = _store(args)
    found = [_find(store, key) for key in args.keys]
    if len(found) == 2:
        differences = difference(found[0].inputs, found[1].inputs)
        print("\n".join(str(item) for item in differences) or "made of the same parts")
        return 0
    from olive.report.redact import tree

    entry = found[0]
    print(f"{entry.key}  {entry.meta.get('step', '')} {entry.meta.get('type', '')}".rstrip())
    for label, value in _parts("", tree(entry.inputs)):
        print(f"  {label}: {value}")
    return 0


def _explain_document(args: argparse.Namespace) -> int:
    from olive.engine.plan import stored_artifact
    from olive.store.store import Store
    from olive.workflows import plan

    planned = plan(args.config, cache_dir=args.cache_dir)
    model = planned.model
    with closing(Store(planned.store_root)) as store:
        for step in planned.steps:
            if step.cached and step.key and model:
                print(f"{step.name}: hit, {step.key[:12]}")
                entry = store.lookup(step.key, verify=False)
                model = stored_artifact(entry, model) if entry else None
            elif step.key is None or model is None:
                print(f"{step.name}: not known before the step before it has run")
                model = None
            else:
                print(f"{step.name}: miss, {step.key[:12]}")
                print("\n".join(f"  {line}" for line in _why(store, planned, step.name, model)))
                model = None
    return 0


def _why(store: Store, planned: Plan, name: str, model: Artifact) -> list[str]:
    from olive.engine.plan import parts_of

    entry = planned.workflow.passes[name]
    parts = parts_of(planned.loaded, entry, model, planned.machine, store.root)
    near = store.nearest(parts)
    if near is None or near[0].meta.get("type") != entry.type:
        return [f"no result of {entry.type} is stored"]
    found, differences = near
    return [f"nearest is {found.key[:12]}, which differs in", *(f"  {item}" for item in differences)]


def _find(store: Store, prefix: str) -> Entry:
    found = [entry for entry in _entries(store) if entry.key.startswith(prefix.lower())]
    if len(found) != 1:
        what = "no result has" if not found else f"{len(found)} results have"
        raise UsageError(f"{what} a key that starts with {prefix}; olive cache ls lists them")
    return found[0]


def _parts(label: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [
            part
            for name, inner in value.items()
            for part in _parts(f"{label}.{name}" if label else str(name), inner)
        ]
    return [(label, json.dumps(value, ensure_ascii=False))]


def configure_verify(parser: Parser) -> None:
    """What ``olive cache verify`` takes."""
    _configure(parser)


def verify(args: argparse.Namespace) -> int:
    """Read and hash every stored result; exit code 5 where one was damaged."""
    from olive.errors import Severity
    from olive.report.console import problems, relative

    store = _store(args)
    found = store.verify()
    if found:
        print(problems(found))
    damaged = [problem for problem in found if problem.severity is not Severity.NOTE]
    print(
        f"{_counted(_entries(store))} in {relative(store.root)} are whole"
        + ("" if not damaged else f", {len(damaged)} findings")
    )
    return 5 if damaged else 0


def configure_gc(parser: Parser) -> None:
    """What ``olive cache gc`` takes."""
    _configure(parser)
    parser.add_argument(
        "--max-size", type=byte_count, metavar="SIZE", help="keep at most this much, e.g. 10GB"
    )
    parser.add_argument(
        "--older-than", type=seconds, metavar="TIME", help="remove what was not used for, e.g., 7d"
    )


def gc(args: argparse.Namespace) -> int:
    """Remove leftovers of crashes, and the results that the limits leave no room for."""
    from olive.report.console import relative
    from olive.report.figures import size

    store = _store(args)
    freed = store.gc(max_bytes=args.max_size, older_than=args.older_than)
    left = sum(entry.size for entry in _entries(store))
    print(f"freed {size(freed)}; {size(left)} of results stay in {relative(store.root)}")
    return 0
