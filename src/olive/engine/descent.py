"""The way down a fallback's rungs, remembered: a killed step goes on at the rung where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from olive.errors import GateFailed, Problem
from olive.store.journal import Journal
from olive.store.keys import key as make_key

if TYPE_CHECKING:
    from olive.engine.fallback import Ladder

T = TypeVar("T")


class Refused(Exception):
    """A gate refused what a step made.

    Args:
        error: the gate's.
        facts: of the attempt.
    """

    def __init__(self, error: GateFailed, facts: Mapping[str, Any]) -> None:
        self.error, self.facts = error, facts


class Descent:
    """Attempts of one step, one rung after the other, each with a journal of its own.

    What failed is kept below the step's journal before anything of the rung is removed. It holds for the very
    attempts that failed: where the rungs or the gates are others today, the step begins at its first rung.

    Args:
        work: the step's journal; only one process at a time works in it.
        ladder: makes the ladder, at its first rung.
        bound: what else a failure depends on; asked only where there is one to go on from.
        tell: told of every failed rung.

    Attributes:
        findings: what was wrong with what was remembered.
    """

    def __init__(
        self,
        work: Journal,
        ladder: Callable[[], Ladder],
        bound: Callable[[], Mapping[str, Any]],
        tell: Callable[[str], None],
    ) -> None:
        self._work, self._make, self._bound, self._tell = work, ladder, bound, tell
        self._memory = Journal(work.path / "failed")
        self.findings: list[Problem] = self._memory.findings

    def run(self, attempt: Callable[[Ladder, Journal], T]) -> T:
        """What the first attempt makes that no gate refuses.

        Args:
            attempt: runs the attempt that the ladder is at, with a journal for it; raises ``Refused``.

        Raises:
            GateFailed: no rung is left; nothing is remembered then.
        """
        ladder, failures = self._resumed()
        while True:
            now = ladder.attempt
            own = {"type": now.type, "params": now.params.model_dump(mode="json")}
            journal = Journal(self._work.path / f"rung-{make_key(own)[:16]}")
            try:
                return attempt(ladder, journal)
            except Refused as refused:
                failures.append(_record(own, refused))
                try:
                    ladder.descend(refused.error, refused.facts)
                except GateFailed:
                    self._work.clear()
                    raise
                state = {"bound": dict(self._bound()), "failures": failures}
                self._memory.commit(len(failures), lambda _: None, state)
                journal.clear()
                self._tell(f"{ladder.failed[-1].text}; falling back to {ladder.attempt.text}")

    def _resumed(self) -> tuple[Ladder, list[dict[str, Any]]]:
        """The ladder at the rung where an earlier run stopped, and what failed above it."""
        ladder = self._make()
        found = self._memory.newest()
        if found is None:
            return ladder, []
        if found.state.get("bound") != _json(self._bound()) or not _descend(ladder, found.state["failures"]):
            self._tell("rungs that failed in an earlier run are tried again: rungs, gates or prompts changed")
            self._memory.clear()
            return self._make(), []
        for place, gate in enumerate(ladder.failed):
            following = (*ladder.tried, ladder.attempt.text)[place + 1]
            self._tell(f"{gate.text}; falling back to {following} (in an earlier run)")
        return ladder, list(found.state["failures"])


def _record(own: Mapping[str, Any], refused: Refused) -> dict[str, Any]:
    error, problem = refused.error, refused.error.problems[0]
    rows = refused.facts.get("layers") or []
    return {
        "attempt": dict(own),
        "message": problem.message,
        "where": problem.where,
        "fix": problem.fix,
        "figures": error.figures,
        "limits": error.limits,
        "layers": [{name: row[name] for name in ("name", "bits", "group_size")} for row in rows],
    }


def _descend(ladder: Ladder, failures: list[dict[str, Any]]) -> bool:
    """Whether the recorded failures lead down this ladder; it is at the rung after them then."""
    for failure in failures:
        now = ladder.attempt
        own = {"type": now.type, "params": now.params.model_dump(mode="json")}
        if _json(own) != failure["attempt"]:
            return False
        error = GateFailed(
            failure["message"],
            where=failure["where"],
            fix=failure["fix"],
            figures=failure["figures"],
            limits=failure["limits"],
        )
        try:
            ladder.descend(error, {"layers": failure["layers"]})
        except GateFailed:
            return False
    return True


def _json(value: Mapping[str, Any]) -> Any:
    """The value as a file gives it back."""
    return json.loads(json.dumps(value))
