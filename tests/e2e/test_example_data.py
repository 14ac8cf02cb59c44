"""The example's dataset keeps the rules its card states."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

DATASET = Path(__file__).parents[2] / "examples" / "phi3-tone" / "dataset"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / "split.py"), "check"], capture_output=True, text=True, timeout=120
    )


def test_the_dataset_keeps_its_rules() -> None:
    done = check(DATASET)
    assert done.returncode == 0, done.stderr
    counts = [len((DATASET / name).read_text().splitlines()) for name in ("phrases.jsonl", "test.json")]
    assert counts[0] >= 1000
    assert counts[1] >= 200


def test_a_leaked_phrase_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    shutil.copytree(DATASET, folder)
    row = json.loads((folder / "test.json").read_text().splitlines()[0])
    with (folder / "dataset-classification.json").open("a") as file:
        file.write(json.dumps(row) + "\n")
    done = check(folder)
    assert done.returncode == 1
    assert row["phrase"][:20] in done.stdout + done.stderr
