"""What can go wrong, by who must act: one exception a cause, each with its exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How a finding bears on the run."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding, written to its reader.

    Args:
        message: what was found, with the value.
        where: file, line and JSON path, or a step's name.
        fix: what to do about it.
        severity: only an ``ERROR`` stops the run.
        exit_code: 2 the document, 5 the environment, 6 untrusted input.
    """

    message: str
    where: str | None = None
    fix: str | None = None
    severity: Severity = Severity.ERROR
    exit_code: int = 2

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.fix:
            parts.append(f"  fix: {self.fix}")
        return "\n".join(parts)


class OliveError(Exception):
    """Base of every error the product raises on purpose."""

    exit_code = 7

    def __init__(
        self,
        message: str = "",
        *,
        where: str | None = None,
        fix: str | None = None,
        problems: Iterable[Problem] = (),
    ) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems) or (
            Problem(message, where, fix, exit_code=self.exit_code),
        )
        super().__init__("\n".join(str(problem) for problem in self.problems))


class ConfigError(OliveError):
    """The document is wrong: its author must act."""

    exit_code = 2


class PassFailed(OliveError):
    """A pass or a gate failed on valid input."""

    exit_code = 3


class GateFailed(PassFailed):
    """A gate measured a model beyond a limit.

    Args:
        message, where, fix: of the problem.
        figures: what was measured, by name.
        limits: what it was held against.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        figures: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> None:
        super().__init__(message, where=where, fix=fix)
        self.figures, self.limits = dict(figures), dict(limits)


class NoCandidate(OliveError):
    """Every step ran and no model met the document's goals."""

    exit_code = 4


class EnvironmentFault(OliveError):
    """The machine is not up to it: a missing package, device, memory, disk or permission."""

    exit_code = 5


class OutOfMemory(EnvironmentFault):
    """Memory ran out in a place where asking for less may help."""


class UntrustedInput(OliveError):
    """The input could execute code or leave its folder: pickle, remote code, a path that escapes."""

    exit_code = 6


class InternalError(OliveError):
    """Our own defect."""

    exit_code = 7


_BY_CODE: dict[int, type[OliveError]] = {
    kind.exit_code: kind for kind in (ConfigError, PassFailed, NoCandidate, EnvironmentFault, UntrustedInput)
}


def raise_errors(problems: Iterable[Problem]) -> None:
    """Raise one exception that carries every error among ``problems``; return when there is none.

    The document (2) goes before untrusted input (6) and the environment (5): the author fixes the document
    first, and all errors of every kind are in the one message.
    """
    errors = [problem for problem in problems if problem.severity is Severity.ERROR]
    if errors:
        codes = {problem.exit_code for problem in errors}
        code = next((code for code in (2, 6, 5, 4, 3) if code in codes), 7)
        raise _BY_CODE.get(code, InternalError)(problems=errors)
