"""Statistics of models that are not quantised yet, kept for every step that asks for the same ones.

They are tensors under a key of labelled parts, in an area of the store beside the results of steps: staged,
hashed, synced and renamed as those, and verified when read. A value found is the value that was computed, to
the bit.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import EnvironmentFault, Problem, Severity
from olive.store.keys import key as make_key
from olive.store.store import Store

if TYPE_CHECKING:
    import torch

FORMAT = 1
_FILE = "values.safetensors"
Tensors = dict[str, "torch.Tensor"]


class Statistics:
    """What one step may find and keep. Without a store nothing is found and nothing kept.

    Args:
        root: the store's folder.
        parts: what every statistic of the step depends on: model, sources, libraries, device.
        data: name of a data config -> what identifies its rows and what is done to them.
        note: told where another process is at the same statistic and this one waits.

    Attributes:
        reused: how many were found, by what they are.
        computed: how many had to be made.
        findings: damage that was met, and values that could not be kept.
    """

    def __init__(
        self,
        root: Path | None = None,
        parts: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        note: Callable[[str], object] | None = None,
    ) -> None:
        self._root, self._parts, self._data = root, dict(parts or {}), dict(data or {})
        self._note = note
        self.reused: Counter[str] = Counter()
        self.computed: Counter[str] = Counter()
        self.findings: list[Problem] = []

    def of(
        self,
        what: str,
        own: Mapping[str, Any],
        compute: Callable[[], Tensors],
        *,
        data: str | None = None,
    ) -> Tensors:
        """A statistic, from the store or computed and kept; two processes never compute one at once.

        Args:
            what: its name, e.g. ``rows``.
            own: what it depends on beside the model: settings it would be another with.
            compute: makes its tensors, on the CPU.
            data: the data config that it depends on.
        """
        if (found := self.find(what, own, data=data)) is not None:
            return found
        with self.turn(what, own, data=data):
            if (found := self.find(what, own, data=data)) is not None:
                return found
            made = compute()
            self.keep(what, own, made, data=data)
        return made

    def find(self, what: str, own: Mapping[str, Any], *, data: str | None = None) -> Tensors | None:
        """A kept statistic; None where there is none, or where it was damaged and is set aside."""
        if self._root is None:
            return None
        from safetensors.torch import load_file

        with self._open() as store:
            entry = store.lookup(make_key(self._key_parts(what, own, data)))
            if entry is None:
                return None
            # copied: a value must not lie in a file that a collection may remove
            values = {name: value.clone() for name, value in load_file(entry.path / _FILE).items()}
        self.reused[what] += 1
        return values

    def keep(
        self,
        what: str,
        own: Mapping[str, Any],
        values: Mapping[str, torch.Tensor],
        *,
        data: str | None = None,
    ) -> None:
        """Keep a statistic that was computed. A store that refuses costs nothing but a warning."""
        self.computed[what] += 1
        if self._root is None:
            return
        from safetensors.torch import save_file

        parts = self._key_parts(what, own, data)
        try:
            with self._open() as store, store.stage() as staging:
                save_file({name: value.contiguous() for name, value in values.items()}, staging.path / _FILE)
                meta = {"type": "statistics", "step": what, "kind": "statistics"}
                store.publish(staging, make_key(parts), meta, parts)
        except EnvironmentFault as fault:
            message = f"{what} of the model could not be kept: {fault.problems[0].message}"
            self.findings.append(
                Problem(message, fault.problems[0].where, fault.problems[0].fix, Severity.WARNING, 5)
            )

    @contextlib.contextmanager
    def turn(self, what: str, own: Mapping[str, Any], *, data: str | None = None) -> Iterator[None]:
        """Be the one process that computes it; waits while another does. Look again once inside.

        Inside of one turn another may be taken, by all in the same order.
        """
        if self._root is None:
            yield
            return

        def waiting() -> None:
            if self._note is not None:
                self._note(f"another run measures {what} of this model; waiting for it")

        with self._open() as store, store.claim(make_key(self._key_parts(what, own, data)), waiting):
            yield

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many of each were found and how many computed; empty where the step asked for none."""
        if not self.reused and not self.computed:
            return {}
        return {"reused": dict(self.reused), "computed": dict(self.computed)}

    @contextlib.contextmanager
    def _open(self) -> Iterator[Store]:
        assert self._root is not None  # noqa: S101 - asked before
        with closing(Store(self._root, "statistics")) as store:
            try:
                yield store
            finally:
                self.findings += store.findings

    def _key_parts(self, what: str, own: Mapping[str, Any], data: str | None) -> dict[str, Any]:
        rows = {} if data is None else {"data": self._data[data]}
        return {"format": FORMAT, "statistic": what, **self._parts, **rows, "own": dict(own)}
