"""``olive run``: the whole way through."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from olive.cli.arguments import Parser, add_document, document

if TYPE_CHECKING:
    from olive.workflows import Document


def configure_run(parser: Parser) -> None:
    """What ``olive run`` takes."""
    add_document(parser)
    parser.add_argument(
        "--download", action="store_true", help="fetch a hub model that is not on this machine first"
    )


def run(args: argparse.Namespace) -> int:
    """Plan the document, carry it out, say what came of it."""
    return run_document(document(args), args)


def run_document(source: Document, args: argparse.Namespace) -> int:
    """The same for a document that is a file or a mapping."""
    from olive.errors import Problem, Severity, raise_errors
    from olive.report.console import problems, relative, summary
    from olive.workflows import carry_out, fetch, plan, take_part

    if args.download:
        fetch(source)
    planned = plan(source, output_dir=args.output_dir, cache_dir=args.cache_dir)
    warnings = [problem for problem in planned.findings if problem.severity.value != "error"]
    if warnings:
        print(problems(warnings), end="\n\n", file=sys.stderr, flush=True)
    raise_errors(planned.findings)
    waiting = [step.name for step in planned.to_run]
    what = f"to run: {', '.join(waiting)}" if waiting else "every step is in the cache"
    print(f"{len(planned.steps)} steps, {what}", file=sys.stderr, flush=True)
    args.kept = (
        f"Finished steps and checkpoints are kept in {relative(planned.store_root)}; "
        "the same command continues from there."
    )
    if planned.host:
        take_part(planned)
        print(f"host {planned.host}: its share is done; the first host goes on", file=sys.stderr)
        return 0
    result = carry_out(planned)
    told = {(problem.message, problem.where) for problem in warnings}
    met = [
        Problem(finding.message, finding.where, finding.fix, Severity(finding.severity))
        for finding in result.findings
        if (finding.message, finding.where) not in told
    ]
    if met:
        print(problems(met), file=sys.stderr, flush=True)
    print(summary(result, relative(planned.output_dir)))
    return 0
