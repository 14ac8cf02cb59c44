"""The way through, as Python: ``from olive.workflows import run``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olive.config.loader import Loaded
    from olive.engine.plan import Plan
    from olive.engine.result import RunResult
    from olive.passes.base import Progress

__all__ = ["fetch", "load", "plan", "run"]

Document = str | Path | Mapping[str, Any]


def load(run_config: Document) -> Loaded:
    """Read and check a document.

    Args:
        run_config: a JSON or YAML file, or the document itself.

    Raises:
        ConfigError: the document is wrong; one problem a cause.
    """
    from olive.config.loader import load as load_document
    from olive.passes.registry import names, params_of

    return load_document(run_config, params_of=params_of, pass_names=names())


def fetch(run_config: Document) -> None:
    """Download what the document's input model needs and this machine lacks.

    Args:
        run_config: a JSON or YAML file, or the document itself.

    Raises:
        ConfigError: the document is wrong, or the hub knows no such model.
        EnvironmentFault: the hub cannot be reached, or asks for a licence to be accepted.
    """
    from olive.resources.resolve import resolve

    loaded = load(run_config)
    given = loaded.workflow.input_model
    resolve(given.model_path, loaded.base_dir, given.load_kwargs.revision)
    if given.adapter_path is not None:
        resolve(given.adapter_path, loaded.base_dir)


def plan(
    run_config: Document, *, output_dir: str | Path | None = None, cache_dir: str | Path | None = None
) -> Plan:
    """Say what a run would do, without doing it. Problems are in the plan's ``findings``.

    Args:
        run_config: a JSON or YAML file, or the document itself.
        output_dir: replaces the document's.
        cache_dir: replaces the document's.

    Raises:
        ConfigError: the document is wrong.
    """
    from olive.engine.plan import plan as make_plan

    return make_plan(
        load(run_config),
        cache_dir=None if cache_dir is None else Path(cache_dir),
        output_dir=None if output_dir is None else Path(output_dir),
    )


def run(
    run_config: Document,
    *,
    output_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    download: bool = False,
) -> RunResult:
    """Plan the document, carry the plan out, write the reports.

    Args:
        run_config: a JSON or YAML file, or the document itself.
        output_dir: replaces the document's.
        cache_dir: replaces the document's.
        progress: told how far it is; default: a bar or lines on standard error.
        download: fetch a hub model that is not on this machine first.

    Returns:
        The result; the model is in ``model/`` of its ``output_dir``.

    Raises:
        OliveError: with the reason and what to do; finished steps are kept.
    """
    if download:
        fetch(run_config)
    return carry_out(plan(run_config, output_dir=output_dir, cache_dir=cache_dir), progress)


def carry_out(planned: Plan, progress: Progress | None = None) -> RunResult:
    """Carry a plan out and write the reports.

    Raises:
        OliveError: with the reason and what to do; finished steps are kept.
    """
    from olive.engine.run import run as run_plan
    from olive.errors import EnvironmentFault
    from olive.report.progress import progress_for
    from olive.report.write import write

    if planned.host:
        raise EnvironmentFault(
            f"this is host {planned.host}: it does its share and has no result",
            fix="Use `olive run` or olive.workflows.take_part on every host but the first.",
        )
    if progress is not None:
        result = run_plan(planned, progress)
    else:
        own = progress_for()
        try:
            result = run_plan(planned, own)
        finally:
            own.close()
    write(result, planned.output_dir)
    return result


def take_part(planned: Plan) -> None:
    """Do another host's share of a plan; the first host carries it out.

    Raises:
        OliveError: an error of the plan or of this host's processes.
    """
    from olive.engine.run import take_part as share
    from olive.report.progress import progress_for

    own = progress_for()
    try:
        share(planned, own)
    finally:
        own.close()
