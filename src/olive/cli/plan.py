"""``olive plan``: what a run would do."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from olive.cli.arguments import Parser, add_document, document

if TYPE_CHECKING:
    from olive.workflows import Document


def configure_plan(parser: Parser) -> None:
    """What ``olive plan`` takes."""
    add_document(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def plan(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is the one ``olive run`` would end with now."""
    return plan_document(document(args), args, as_json=args.json)


def plan_document(source: Document, args: argparse.Namespace, *, as_json: bool = False) -> int:
    """The same for a document that is a file or a mapping."""
    from olive.errors import OliveError, raise_errors
    from olive.report.console import plan_view
    from olive.report.plan_json import plan_json
    from olive.workflows import plan as make_plan

    planned = make_plan(source, output_dir=args.output_dir, cache_dir=args.cache_dir)
    print(json.dumps(plan_json(planned), indent=2, ensure_ascii=False) if as_json else plan_view(planned))
    try:
        raise_errors(planned.findings)
    except OliveError as error:  # the view lists the problems already
        return error.exit_code
    return 0
