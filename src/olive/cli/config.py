"""``olive config migrate | schema``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from olive.cli.arguments import Parser


def configure_migrate(parser: Parser) -> None:
    """What ``olive config migrate`` takes."""
    parser.add_argument("document", metavar="FILE", help="a document in any spelling, JSON or YAML")
    parser.add_argument("-o", "--output", metavar="OUT", help="where to write it (default: standard output)")


def migrate(args: argparse.Namespace) -> int:
    """Write the document in today's spelling; say on standard error what was rewritten."""
    from olive.config.loader import dumps
    from olive.report.console import problems
    from olive.workflows import load

    loaded = load(args.document)
    target = Path(args.output or args.document)
    text = dumps(loaded.document, "yaml" if target.suffix.lower() in (".yaml", ".yml") else "json")
    if loaded.findings:
        print(problems(loaded.findings), file=sys.stderr)
    if args.output:
        target.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    else:
        print(text.rstrip("\n"))
    return 0


def configure_schema(parser: Parser) -> None:
    """What ``olive config schema`` takes."""


def schema(args: argparse.Namespace) -> int:
    """Print the JSON Schema of the document."""
    from olive.config.schema import schema as document_schema
    from olive.passes.registry import names, params_of

    print(json.dumps(document_schema(params_of, names()), indent=2))
    return 0
