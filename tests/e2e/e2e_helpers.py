"""Run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def olive(*arguments: str, cwd: Path, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    """``python -m olive ARGUMENTS`` in ``cwd``, colours off."""
    return subprocess.run(
        [sys.executable, "-m", "olive", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "NO_COLOR": "1"},
    )
