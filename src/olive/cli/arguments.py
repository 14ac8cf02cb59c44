"""Arguments: argparse that says what was probably meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from olive.config.suggest import closest

_SIZES = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ``UsageError`` and knows its neighbours' names."""

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Add an argument and remember its spelling."""
        self.options += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **settings)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse ``arguments``.

        Raises:
            UsageError: with what was probably meant.
        """
        for argument in arguments:
            if argument == "--":
                break
            name = argument.split("=", 1)[0]
            if re.fullmatch(r"--?[A-Za-z][\w-]*", name) and name not in self.options:
                if name[1] != "-" and name[:2] in self.options:
                    continue
                raise UsageError(f"{self.prog} has no option {name}{hint(name, self.options)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise UsageError(f"{self.prog}: {message}")


def hint(name: str, known: Sequence[str]) -> str:
    """``; did you mean --config?`` or what there is."""
    spelt = {
        option.lstrip("-"): option
        for option in known
        if option.startswith("--") or not option.startswith("-")
    }
    found = closest(name.lstrip("-"), spelt)
    if found is not None:
        return f"; did you mean {spelt[found]}?"
    return f"; there is {', '.join(spelt.values())}"


def add_document(parser: Parser) -> None:
    """The document, positional or by flag, and the folders that a flag replaces."""
    parser.add_argument("document", nargs="?", metavar="FILE", help="the workflow document, JSON or YAML")
    parser.add_argument("--config", "--run-config", dest="config", metavar="FILE", help="the same, as a flag")
    parser.add_argument("-o", "--output-dir", metavar="DIR", help="replaces the document's output_dir")
    parser.add_argument("--cache-dir", metavar="DIR", help="replaces the document's cache_dir")


def document(args: argparse.Namespace) -> str:
    """The document that was named.

    Raises:
        UsageError: none, or two.
    """
    named: list[str] = [name for name in (args.document, args.config) if name is not None]
    if len(set(named)) != 1:
        found = (
            "no document was named" if not named else f"two documents were named, {named[0]} and {named[1]}"
        )
        raise UsageError(f"{found}; write {args.prog} FILE")
    return named[0]


def byte_count(text: str) -> int:
    """``500MB``, ``10G``, ``1.5GiB`` in bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _SIZES:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 10GB")
    return int(float(match[1]) * _SIZES[match[2]])


def seconds(text: str) -> float:
    """``12h``, ``7d`` or ``2w`` in seconds; a bare number is days."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw]?)\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 12h, 7d or 2w")
    return float(match[1]) * _TIMES[match[2] or "d"]


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    if not (value := number(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def number(text: str) -> float:
    """A finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return value


def whole(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def one_of(*known: str) -> Callable[[str], str]:
    """One of these words, in any case."""

    def read(text: str) -> str:
        if text.lower() not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not known{hint(text, known)}")
        return text.lower()

    return read
