"""``olive plan``: what a run would do."""

from __future__ import annotations

import argparse
import json

from olive.cli.arguments import Parser, add_document, document


def configure_plan(parser: Parser) -> None:
    """What ``olive plan`` takes."""
    add_document(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def plan(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is the one ``olive run`` would end with now."""
    from olive.errors import OliveError, raise_errors
    from olive.report.console import plan_view
    from olive.report.plan_json import plan_json
    from olive.workflows import plan as make_plan

    planned = make_plan(document(args), output_dir=args.output_dir, cache_dir=args.cache_dir)
    print(json.dumps(plan_json(planned), indent=2, ensure_ascii=False) if args.json else plan_view(planned))
    try:
        raise_errors(planned.findings)
    except OliveError as error:  # the view lists the problems already
        return error.exit_code
    return 0
