"""A workflow document, whatever its spelling, to a typed Workflow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from olive.config import dialects, lint, validate
from olive.config.positions import Document, parse
from olive.config.rewrite import Context, ParamsOf
from olive.config.suggest import closest
from olive.config.tree import Findings, Node, from_mapping, grow
from olive.config.workflow import Workflow
from olive.errors import ConfigError, EnvironmentFault, Problem, Severity, raise_errors

MAX_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded document.

    Attributes:
        workflow: the typed document.
        document: the same in today's spelling, with what the author wrote and no more: what
            ``olive config migrate`` writes. Loading it gives an equal workflow and no rewrite.
        findings: rewrites and keys without effect (notes), contradictions (warnings); no errors.
        path: the file; None for a document given as a mapping.
        base_dir: folder that relative paths are looked up in: the current one.
    """

    workflow: Workflow
    document: dict[str, Any]
    findings: tuple[Problem, ...]
    path: Path | None
    base_dir: Path


def load(
    source: str | Path | Mapping[str, Any], *, params_of: ParamsOf, pass_names: tuple[str, ...]
) -> Loaded:
    """Load a document.

    Args:
        source: a JSON or YAML file, or the document itself.
        params_of: name of a pass -> type of its parameters.
        pass_names: every pass a document may name.

    Raises:
        ConfigError: the document is wrong; it has one problem a cause, each with file, line and JSON path.
        EnvironmentFault: the file cannot be read.
    """
    path = None if isinstance(source, Mapping) else Path(source)
    document = from_mapping(source) if isinstance(source, Mapping) else read(Path(source))
    findings = Findings(document)
    root = grow(document.value)
    if not isinstance(root.value, dict):
        raise ConfigError(
            f"a document is an object, not {type(root.value).__name__}", where=document.where(())
        )
    context = Context(root, findings, dialects.is_old(root), params_of, pass_names)
    dialects.rewrite(context)
    workflow, broken = validate.build(context)
    lint.references(context, broken)
    if workflow is not None and not findings.failed:
        lint.lint(context, workflow)
    raise_errors(findings.problems)
    if workflow is None:
        raise ConfigError("the document does not validate", where=document.where(()))
    return Loaded(workflow, _document(root), tuple(findings.problems), path, Path.cwd())


def read(path: Path) -> Document:
    """Read and parse a file.

    Raises:
        ConfigError: no such file, not UTF-8, too large, or neither JSON nor YAML.
        EnvironmentFault: the file is there and cannot be read.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder", fix="give the JSON or YAML file in it")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"there is no file {path}", where=str(path), fix=_near(path)) from error
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be read: {error.strerror or error}", where=str(path)
        ) from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"{str(path)!r} is no file name: {error}") from error
    if len(data) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES >> 20} MiB: no workflow document", where=str(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"not UTF-8: byte {data[error.start]:#04x}", where=f"{path}:{line}", fix="save the file as UTF-8"
        ) from error
    return parse(text, str(path))


def _near(path: Path) -> str | None:
    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix in (".json", ".yaml", ".yml")]
    except OSError:
        return f"there is no folder {path.parent} either"
    found = closest(path.name, sorted(names))
    return f"did you mean {path.parent / found}?" if found else f"looked in {path.parent.absolute()}"


def _document(root: Node) -> dict[str, Any]:
    found: dict[str, Any] = root.plain()
    return found


def dumps(document: Mapping[str, Any], form: Literal["json", "yaml"] = "json") -> str:
    """The document as text that ``load`` reads back to the same value."""
    if form == "yaml":
        from olive.config.yaml_positions import dump_yaml

        return dump_yaml(dict(document))
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def rewrites(loaded: Loaded) -> tuple[Problem, ...]:
    """The notes among the findings: what older spelling was translated, and what has no effect."""
    return tuple(problem for problem in loaded.findings if problem.severity is Severity.NOTE)
