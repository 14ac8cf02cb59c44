"""``olive``: find the verb, parse its arguments, call it, turn errors into exit codes.

Nothing of the other rooms is imported before a verb is called, so ``olive --help`` is fast.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from olive.cli.arguments import Parser, UsageError, hint


class Verb(NamedTuple):
    """One verb: its module has ``configure_<call>(parser)`` and ``<call>(args) -> exit code``."""

    module: str
    call: str
    help: str


VERBS: dict[str, Verb] = {
    "finetune": Verb("finetune", "finetune", "fine-tune a model on a dataset, the document inferred"),
    "run": Verb("run", "run", "carry a workflow document out"),
    "plan": Verb("plan", "plan", "say what a run would do, and what would go wrong"),
    "chat": Verb("chat", "chat", "talk to the model in an output folder"),
    "doctor": Verb("doctor", "doctor", "say what this machine can do and what is missing"),
    "config migrate": Verb("config", "migrate", "rewrite a document in today's spelling"),
    "config schema": Verb("config", "schema", "print the JSON Schema of the document"),
    "cache ls": Verb("cache", "ls", "list stored results"),
    "cache explain": Verb(
        "cache", "explain", "say what a stored result was made of, or why a step is a miss"
    ),
    "cache verify": Verb("cache", "verify", "hold every stored result against its digests"),
    "cache gc": Verb("cache", "gc", "remove leftovers and old results"),
}
_CODES = """exit codes:
  0 done   2 the document or the command line   3 a pass or a gate failed   4 no candidate met the goals
  5 the environment   6 untrusted input   7 our own defect   130, 143 stopped by a signal"""


class Terminated(BaseException):
    """SIGTERM arrived."""


def entry(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    args = argparse.Namespace(kept=None)
    try:
        with _terminable():
            return _dispatch(given, args)
    except UsageError as error:
        return _say(str(error), 2)
    except SystemExit as stop:  # argparse, after --help or --version
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return _say(_stopped(args), 130)
    except Terminated:
        return _say(_stopped(args), 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the flush at exit stays silent
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    except Exception as error:  # noqa: BLE001 - the one place where an error becomes an exit code
        if debug:
            import traceback

            traceback.print_exc()
        return _failed(error, args)


def _dispatch(given: list[str], args: argparse.Namespace) -> int:
    common = []
    while given and given[0] in ("--debug", "--no-color"):
        common.append(given.pop(0))
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if given else 2
    if given[0] in ("--version", "-V", "version"):
        from importlib.metadata import version

        print(f"olive-next {version('olive-next')}")
        return 0
    name = _verb(given)
    verb = VERBS[name]
    module = importlib.import_module(f"olive.cli.{verb.module}")
    parser = Parser(prog=f"olive {name}", description=f"{verb.help[0].upper()}{verb.help[1:]}.")
    getattr(module, f"configure_{verb.call}")(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--no-color", action="store_true", help="plain output; NO_COLOR does the same")
    parser.set_defaults(prog=f"olive {name}", kept=None)
    for key, value in vars(parser.read([*given[len(name.split()) :], *common])).items():
        setattr(args, key, value)
    if args.no_color:
        os.environ["NO_COLOR"] = "1"
    try:
        code: int = getattr(module, verb.call)(args)
    except SystemExit as stop:  # of a library: it must not look like our own success
        raise RuntimeError(f"something ended the program (exit {stop.code})") from stop
    sys.stdout.flush()
    return code


def _verb(given: list[str]) -> str:
    first = given[0]
    if first in VERBS:
        return first
    seconds = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if not seconds:
        firsts = list(dict.fromkeys(name.split()[0] for name in VERBS))
        if first.startswith("-"):
            raise UsageError(f"olive has no option {first}; write a verb first: {', '.join(firsts)}")
        raise UsageError(f"olive has no verb {first}{hint(first, firsts)}")
    if len(given) == 1 or given[1] in ("-h", "--help"):
        print(overview(first))
        raise SystemExit(0 if len(given) > 1 else 2)
    if given[1] not in seconds:
        raise UsageError(f"olive {first} has no verb {given[1]}{hint(given[1], seconds)}")
    return f"{first} {given[1]}"


def overview(group: str = "") -> str:
    """The help text of ``olive``, or of one group of verbs."""
    shown = {name: verb.help for name, verb in VERBS.items() if name.startswith(f"{group} ") or not group}
    width = max(map(len, shown))
    lines = [f"usage: olive {group + ' ' if group else ''}VERB [...]", ""]
    if not group:
        lines += ["One document in, the best small model for your device out.", ""]
    lines += [f"  {name:<{width}}   {text}" for name, text in shown.items()]
    lines += ["", "olive VERB --help says what a verb takes."]
    return "\n".join(lines if group else [*lines, "", _CODES])


def _failed(error: Exception, args: argparse.Namespace) -> int:
    from olive.errors import OliveError
    from olive.report.console import problems

    if isinstance(error, OliveError):
        print(problems(error.problems), file=sys.stderr)
        if args.kept and error.exit_code in (3, 5):
            print(args.kept, file=sys.stderr)
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "olive").startswith("olive"):
        return _say(
            f"{error.name} is not installed; pip install 'olive-next[cpu]' brings what a run needs", 5
        )
    if isinstance(error, MemoryError):
        return _say("memory ran out; lower max_seq_len or the batch size, or use a larger machine", 5)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return _say(f"{error.strerror}: {error.filename or 'unknown file'}", 5)
    from olive.report.redact import text

    return _say(
        text(f"our own defect, {type(error).__name__}: {error}; run again with --debug for the traceback"), 7
    )


def _say(message: str, code: int) -> int:
    print(message if code >= 128 else f"error: {message}", file=sys.stderr, flush=True)
    return code


def _stopped(args: argparse.Namespace) -> str:
    return f"\nstopped. {args.kept}" if args.kept else "\nstopped."


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that bars and staging folders are cleaned up."""

    def terminate(*_: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
