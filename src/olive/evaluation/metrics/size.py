"""Size on disk of what must be there to run the model."""

from __future__ import annotations

from pathlib import Path

from olive.config.workflow import Metric
from olive.evaluation.session import Measured, Session


def measure(metric: Metric, session: Session) -> dict[str, Measured]:
    """Bytes of the model's files; an adapter counts with its base."""
    total = folder_size(session.model.path)
    if session.model.base is not None:
        total += folder_size(session.model.base.path)
    return {"bytes": Measured(float(total), 1)}


def folder_size(folder: Path) -> int:
    """Bytes of all files below ``folder``, hidden ones (version control, download caches) left out."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
