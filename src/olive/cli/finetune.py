"""``olive finetune``: a model and a dataset in; the document is inferred, shown, and run as any other."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from olive.cli.arguments import Parser, UsageError, count, number, one_of, positive, whole
from olive.cli.plan import plan_document
from olive.cli.run import run_document

METHODS = ("lora", "qlora", "dora", "loha", "lokr", "dpo", "orpo", "full")
PRECISIONS = ("int4", "int8", "fp16", "fp32", "none")


def configure_finetune(parser: Parser) -> None:
    """What ``olive finetune`` takes."""
    add = parser.add_argument
    add("-m", "--model", required=True, metavar="MODEL", help="model folder or hub id")
    add(
        "-d",
        "--data",
        required=True,
        metavar="DATA",
        help="json, jsonl, csv or parquet file, folder, hub name",
    )
    add(
        "--method", type=one_of(*METHODS), default="lora", metavar="NAME", help=f"{', '.join(METHODS)} (lora)"
    )
    add("-o", "--output-dir", metavar="DIR", help="where the result goes (olive-output)")
    add("--cache-dir", metavar="DIR", help="where steps are kept (.olive-cache)")
    add(
        "--template",
        metavar="TEXT",
        help=r"how a row reads, e.g. 'Q: {question}\nA: {answer}'; \n is a line end",
    )
    add("--text-cols", metavar="A,B", help="columns to join, when there is no template")
    add("--split", default="train", metavar="NAME", help="which split of the data (train)")
    add("--eval-data", metavar="DATA", help="held-out data, as --data")
    add("--eval-size", type=number, metavar="N", help="part to hold out: a share, or rows from 1 on (0.1)")
    add("--epochs", type=positive, metavar="N", help="times through the data (3)")
    add("--max-steps", type=count, metavar="N", help="optimizer steps, in place of --epochs")
    add("--lr", type=positive, metavar="X", help="learning rate (2e-4; full: 2e-5; dpo, orpo: 1e-5)")
    add("--r", type=count, metavar="N", help="rank of the adapter (16)")
    add("--alpha", type=positive, metavar="N", help="the adapter is scaled by alpha / r (twice the rank)")
    add("--max-seq-len", type=count, metavar="N", help="tokens of a block (from the longest row)")
    add("--precision", type=one_of(*PRECISIONS), default="int4", metavar="NAME",
        help=f"of the exported model: {', '.join(PRECISIONS)} (int4)")  # fmt: skip
    add("--device", type=one_of("cpu", "gpu"), metavar="NAME", help="cpu or gpu (what is there)")
    add("--devices", type=count, metavar="N", help="how many devices train at once (every GPU, or one CPU)")
    add("--seed", type=whole, metavar="N", help="seed of the training")
    add(
        "--save-config", metavar="FILE", help="write the document here; olive run --config FILE does the same"
    )
    add("--dry-run", action="store_true", help="show document and plan, and stop")
    add("--download", action="store_true", help="fetch a hub model or dataset that is not on this machine")


def finetune(args: argparse.Namespace) -> int:
    """Infer the document, show it, save it where asked, and run it."""
    _check(args)
    from olive.config.loader import dumps
    from olive.report.redact import text, tree
    from olive.workflows import fetch, load
    from olive.workflows.recipe import Request
    from olive.workflows.recipe import finetune as recipe_of

    if args.download:
        fetch({"input_model": {"type": "HfModel", "model_path": args.model}})
    recipe = recipe_of(Request(**_request(args)))
    for choice, reason in recipe.reasons:
        print(text(f"{choice}: {reason}"), file=sys.stderr)
    print(dumps(tree(recipe.document)), end="", flush=True)
    load(recipe.document)
    if args.save_config is not None:
        _save(recipe.document, Path(args.save_config))
    if args.dry_run:
        print()
        return plan_document(recipe.document, args)
    return run_document(recipe.document, args)


def _check(args: argparse.Namespace) -> None:
    """Options that exclude each other."""
    excluded = (
        ("epochs", "max_steps"),
        ("eval_data", "eval_size"),
        ("template", "text_cols"),
    )
    for pair in excluded:
        if all(getattr(args, name) is not None for name in pair):
            raise UsageError("{} and {} exclude each other".format(*map(_option, pair)))
    for name in ("r", "alpha"):
        if args.method == "full" and getattr(args, name) is not None:
            raise UsageError(f"{_option(name)} is a setting of adapters, and --method full trains none")
    if args.method in ("dpo", "orpo") and (args.template is not None or args.text_cols is not None):
        raise UsageError(f"--method {args.method} reads the columns prompt, chosen, rejected: no template")
    if args.text_cols is not None and not all(_names(args.text_cols)):
        raise UsageError(f"--text-cols {args.text_cols!r} has an empty name; write --text-cols a,b")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _request(args: argparse.Namespace) -> dict[str, Any]:
    same = ("model", "data", "method", "output_dir", "cache_dir", "split", "eval_data", "eval_size", "epochs",
            "max_steps", "r", "alpha", "max_seq_len", "precision", "device", "devices", "seed",
            "download")  # fmt: skip
    return {name: getattr(args, name) for name in same} | {
        "template": args.template and args.template.replace("\\n", "\n").replace("\\t", "\t"),
        "text_cols": _names(args.text_cols) if args.text_cols else (),
        "learning_rate": args.lr,
    }


def _save(document: dict[str, Any], path: Path) -> None:
    """Write the document; a file that is no workflow document is left alone."""
    from olive.config.loader import dumps, read
    from olive.errors import ConfigError

    if path.exists():
        try:
            ours = isinstance(found := read(path).value, dict) and "input_model" in found
        except ConfigError:
            ours = False
        if not ours:
            raise UsageError(f"--save-config {path} is there and is no workflow document; name another file")
    form = "yaml" if path.suffix.lower() in (".yaml", ".yml") else "json"
    try:
        path.write_text(dumps(document, form), encoding="utf-8")  # type: ignore[arg-type]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"there is no folder {path.parent} for --save-config {path}") from error
