"""Start-up: `olive --help`, `olive plan` on the published document, and a repeated identical run.

    python benchmarks/cli.py

Prints user + system CPU seconds and wall seconds, the median of five, beside a bare `python -c pass`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "phi3-tone"


def measure(command: list[str], runs: int = 5) -> tuple[float, float]:
    """Median CPU and wall seconds."""
    cpu, wall = [], []
    for _ in range(runs):
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=EXAMPLE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall.append(time.monotonic() - started)
        cpu.append(usage.ru_utime + usage.ru_stime)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{' '.join(command)} failed")
    return statistics.median(cpu), statistics.median(wall)


def main() -> None:
    """Print one line a command."""
    python = [sys.executable, "-m", "olive"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "olive --help": [*python, "--help"],
        "olive plan olive-config.json": [*python, "plan", "olive-config.json"],
    }
    if (EXAMPLE / "olive-output" / "run.json").is_file():
        commands["olive run tone.json, again"] = [*python, "run", "--config", "tone.json"]
    figures = {}
    for name, command in commands.items():
        cpu, wall = measure(command)
        figures[name] = {"cpu": round(cpu, 3), "wall": round(wall, 3)}
        print(f"{name:32} {cpu:6.3f} s CPU {wall:6.3f} s wall")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
