"""Write run.json, report.html and README.md beside ``model/``."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from olive.engine.result import RunResult
from olive.errors import EnvironmentFault
from olive.report import card, page, redact

FILES = ("run.json", "report.html", "README.md")


def write(result: RunResult, output_dir: Path) -> None:
    """Write the three reports of a run into ``output_dir``, each whole or not at all.

    Secrets are blanked out first. The same result gives the same bytes.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    shown = redact.result(result)
    texts = (
        json.dumps(redact.document(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        page.render(shown),
        card.card(shown),
    )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, text in zip(FILES, texts, strict=True):
            _replace(output_dir / name, text)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise EnvironmentFault(
            f"the report cannot be written to {output_dir}: {error.strerror or error}",
            fix="Free space and run again: every finished step is kept."
            if full
            else "Give write permission, or set output_dir.",
        ) from error


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".olive-report-{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # left by a killed process that had this id
    try:
        with temporary.open("x", encoding="utf-8", newline="\n", errors="replace") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
