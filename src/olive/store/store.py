"""The store: results addressed by what made them, complete or absent, verified when read.

A result is staged in a folder of its own, every file is hashed and synced, a manifest is written last, and
one rename publishes it. A lookup holds the files against the manifest; what is off is set aside and counts as
a miss.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from olive.errors import EnvironmentFault, OliveError, Problem, Severity
from olive.store.entry import Entry as Entry
from olive.store.entry import Staging as Staging
from olive.store.faults import environment_fault, free_bytes, full_disk, reported
from olive.store.integrity import (
    FILES,
    FORMAT,
    MANIFEST,
    DamagedError,
    check_files,
    parse_table,
    read_manifest,
    settle,
    size_of,
    sync,
    table_digest,
    tabulate,
    write_manifest,
)
from olive.store.journal import Journal
from olive.store.keys import Difference, difference, require_key
from olive.store.lease import Lease, Leases
from olive.store.leftovers import Leftovers, discard
from olive.store.materialise import materialise


class Store:
    """A folder of results that many processes may share.

    What ``lookup`` and ``publish`` return stays protected from ``gc`` until ``close`` or the end of the
    process.

    Args:
        root: its folder; made when first written to.
        area: ``entries``: results of steps; ``statistics``: what was measured on the way. Lookups see one
            area; ``gc`` and ``verify`` of the first take both.

    Attributes:
        root: that folder.
        area: that area.
        findings: damage met so far.
    """

    def __init__(self, root: Path, area: Literal["entries", "statistics"] = "entries") -> None:
        self.root = Path(root).expanduser().absolute()
        self.area = area
        self.findings: list[Problem] = []
        self._leases = Leases(self.root / "leases")
        self._leftovers = Leftovers(self.root, self._leases)
        self._kept: dict[str, Lease] = {}

    def lookup(self, key: str, verify: bool = True) -> Entry | None:
        """The stored result of ``key``, or None; a damaged one is set aside and noted in ``findings``.

        Args:
            key: 64 hex digits.
            verify: read and hash every file; otherwise only the names and sizes are compared.

        Raises:
            EnvironmentFault: it cannot be read for a reason that is no damage; it is kept.
        """
        folder = self._folder(key)
        with reported(folder, "reading the store"):
            if not folder.exists():
                return None
            self._keep(key)
            try:
                identity = _identity(folder)
            except FileNotFoundError:  # gc was faster than our lease
                self._let_go(key)
                return None
            try:
                entry = self._read(key, content=verify)
            except DamagedError as damage:
                self._quarantine(key, identity, damage)
                return None
            with contextlib.suppress(OSError):
                os.utime(folder / MANIFEST)
            return entry

    @contextlib.contextmanager
    def stage(self, needed: int = 0) -> Iterator[Staging]:
        """An empty folder to make a result in.

        Args:
            needed: bytes the result is expected to take; checked against the disk before work starts.

        Raises:
            EnvironmentFault: the disk is or runs full; the folder is removed, stored results are kept.
        """
        name = f"staging-{uuid.uuid4().hex}"
        folder = self.root / "staging" / name
        with reported(folder, "starting to store"):
            lease = self._leases.hold(name)
            self._leftovers.sweep_staging()
            (folder / FILES).mkdir(parents=True)
        try:
            self._require_space(folder, needed)
            yield Staging(folder / FILES)
        except Exception as error:
            if isinstance(error, OliveError) or (full := full_disk(error, folder)) is None:
                raise
            written = size_of(folder)
            raise environment_fault(full, folder, "making the result", needed=max(needed, written)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lease.release()

    def publish(self, staging: Staging, key: str, meta: dict[str, Any], inputs: dict[str, Any]) -> Entry:
        """Store what was staged under ``key``. Where another process was first, its result is the result.

        Args:
            staging: the folder given by ``stage``.
            key: 64 hex digits.
            meta: JSON facts to keep with it.
            inputs: the labelled parts the key was made of, for ``cache explain``.

        Raises:
            EnvironmentFault: the disk is full or refuses; nothing is stored.
            PassFailed: the folder holds links or devices.
        """
        target = self._folder(key)
        folder = staging.path.parent
        with reported(folder, "storing the result", needed=size_of(folder)):
            settle(staging.path)
            files = tabulate(staging.path)
            now = datetime.datetime.now(datetime.UTC)
            body = {
                "format": FORMAT,
                "key": key,
                "created": int(now.timestamp()),
                "files": files,
                "meta": meta,
                "inputs": inputs,
            }
            write_manifest(folder, body)
            target.parent.mkdir(parents=True, exist_ok=True)
            return self._move_in(folder, target, key)

    def _move_in(self, folder: Path, target: Path, key: str) -> Entry:
        for _ in range(8):
            self._keep(key)
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if (entry := self.lookup(key)) is not None:
                    return entry
                continue
            sync(target.parent)
            return self._read(key, content=False)
        raise EnvironmentFault(
            f"entry {key[:12]} is damaged again and again while it is stored",
            where=str(target),
            fix="check the disk, or use another cache folder",
        )

    def journal(self, key: str) -> Journal:
        """The journal of the step ``key``, kept until ``Journal.clear``."""
        return Journal(self.root / "work" / require_key(key))

    @contextlib.contextmanager
    def lease(self, key: str) -> Iterator[None]:
        """Protect ``key`` from ``gc`` while the context is open."""
        require_key(key)
        with reported(self.root, "protecting an entry"):
            lease = self._leases.hold(key)
        try:
            yield
        finally:
            lease.release()

    @contextlib.contextmanager
    def claim(self, key: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Be the one process that computes ``key``; waits while another does. Look up again once inside.

        Args:
            key: 64 hex digits.
            waiting: called once where another process is at it.
        """
        name = f"claim-{require_key(key)}"
        with contextlib.ExitStack() as stack:
            with reported(self.root, "starting a step"):
                if waiting is not None and not self._leases.free(name):
                    waiting()
                stack.enter_context(self._leases.alone(name))
            yield

    def materialise(self, entry: Entry, dest: Path) -> Path:
        """Deliver a copy of an entry to ``dest``: the previous delivery or this one, whole, at every moment.

        Raises:
            ConfigError: ``dest`` holds files that we did not put there; nothing is touched.
            EnvironmentFault: the machine refused; ``dest`` is as it was.
        """
        place = hashlib.sha256(str(Path(dest).expanduser().resolve()).encode()).hexdigest()[:16]
        doing = reported(Path(dest), "delivering the result", needed=entry.size)
        with doing, self._leases.alone(f"output-{place}"):
            return materialise(entry.path, entry.files, entry.digest, int(entry.created), Path(dest))

    def areas(self) -> tuple[Store, ...]:
        """This area of the store, and beside the results of steps that of statistics."""
        return (self, Store(self.root, "statistics")) if self.area == "entries" else (self,)

    def entries(self) -> Iterator[Entry]:
        """Every entry whose manifest reads; contents are not checked (``verify`` does)."""
        for key in self._keys():
            with contextlib.suppress(DamagedError), reported(self.root, "reading the store"):
                yield self._entry(key, read_manifest(self._folder(key)))

    def nearest(self, inputs: dict[str, Any]) -> tuple[Entry, list[Difference]] | None:
        """The entry made of the most similar parts, and the parts in which it differs: why it was a miss."""
        ranked = [(difference(entry.inputs, inputs), entry) for entry in self.entries()]
        if not ranked:
            return None
        found, entry = min(ranked, key=lambda pair: (len(pair[0]), -pair[1].created))
        return entry, found

    def remove(self, key: str) -> int:
        """Remove one entry; returns the bytes freed, 0 where another process uses it or there is none."""
        self._let_go(require_key(key))
        with reported(self.root, "removing an entry"):
            return self._evict(key)

    def gc(self, max_bytes: int | None = None, older_than: float | None = None) -> int:
        """Remove leftovers, and the least recently used entries; never one in use.

        Args:
            max_bytes: keep at most so much.
            older_than: remove what was not used for so many seconds.

        Returns:
            Bytes freed.
        """
        with reported(self.root, "cleaning the store"):
            freed = self._leftovers.sweep()
            now = datetime.datetime.now(datetime.UTC).timestamp()
            found = [(entry, area) for area in self.areas() for entry in area.entries()]
            total = sum(entry.size for entry, _ in found)
            for entry, area in sorted(found, key=lambda each: each[0].used):
                old = older_than is not None and now - entry.used > older_than
                if old or (max_bytes is not None and total > max_bytes):
                    gone = area._evict(entry.key)
                    freed += gone
                    total -= entry.size if gone else 0
        return freed

    def verify(self) -> list[Problem]:
        """Hold every entry against its manifest; damaged ones are set aside. Leftovers are listed."""
        found: list[Problem] = []
        for area in self.areas():
            before = len(area.findings)
            for key in list(area._keys()):
                try:
                    held = key in area._kept
                    area.lookup(key)
                    if not held:
                        area._let_go(key)
                except EnvironmentFault as fault:
                    found.extend(fault.problems)
            found.extend(area.findings[before:])
        found.extend(self._leftovers.problems())
        return found

    def close(self) -> None:
        """Let go of every entry looked up or published here."""
        while self._kept:
            self._kept.popitem()[1].release()

    def _folder(self, key: str) -> Path:
        return self.root / self.area / require_key(key)

    def _keys(self) -> list[str]:
        folder = self.root / self.area
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def _keep(self, key: str) -> None:
        if key not in self._kept:
            self._kept[key] = self._leases.hold(key)

    def _let_go(self, key: str) -> None:
        if (lease := self._kept.pop(key, None)) is not None:
            lease.release()

    def _read(self, key: str, *, content: bool) -> Entry:
        folder = self._folder(key)
        body = read_manifest(folder)
        if body.get("key") != key:
            raise DamagedError("the manifest belongs to another key")
        entry = self._entry(key, body)
        check_files(entry.path, entry.files, content=content)
        if odd := {path.name for path in folder.iterdir()} - {FILES, MANIFEST}:
            raise DamagedError(f"{min(odd)} is not listed")
        return entry

    def _entry(self, key: str, body: dict[str, Any]) -> Entry:
        files = parse_table(body.get("files"))
        folder = self._folder(key)
        try:
            used = (folder / MANIFEST).stat().st_mtime
            return Entry(
                key=key,
                path=folder / FILES,
                digest=table_digest(files),
                size=sum(size for size, _ in files.values()),
                meta=dict(body["meta"]),
                inputs=dict(body["inputs"]),
                created=float(body["created"]),
                used=used,
                files=files,
            )
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise DamagedError(f"the manifest lacks a part: {error}") from error

    def _quarantine(self, key: str, identity: tuple[int, int], damage: DamagedError) -> None:
        """Set the very folder aside that was found damaged, not one that another process put there since."""
        aside = self.root / "quarantine" / f"{key}-{uuid.uuid4().hex}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        what = "result" if self.area == "entries" else "statistic"
        self._let_go(key)
        with self._leases.idle(key), contextlib.suppress(FileNotFoundError):
            if _identity(self._folder(key)) == identity:
                os.rename(self._folder(key), aside)
                self.findings.append(
                    Problem(
                        f"the stored {what} {key[:12]} is damaged ({damage}): set aside, to be made again",
                        where=str(aside),
                        fix="check the disk if this happens again",
                        severity=Severity.WARNING,
                        exit_code=5,
                    )
                )

    def _evict(self, key: str) -> int:
        trash = self.root / "staging" / f"staging-{uuid.uuid4().hex}"
        trash.parent.mkdir(parents=True, exist_ok=True)
        with self._leases.idle(key) as idle:
            if not idle or not self._folder(key).exists():
                return 0
            os.rename(self._folder(key), trash)
        return discard(trash)

    def _require_space(self, folder: Path, needed: int) -> None:
        free = free_bytes(folder)
        if free is not None and needed > free:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            raise environment_fault(error, folder, "making the result", needed=needed)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
