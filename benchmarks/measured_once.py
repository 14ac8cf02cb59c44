"""CPU seconds of a second choice of bits where the measurements of the first one are kept.

    python benchmarks/measured_once.py [--tokens 4096] [--budgets 5.5 6.5]

Base and text as in benchmarks/quantize.py: `SelectiveMixedPrecision` with `kl` by one budget, then by another
in the same cache, then by that one in an empty cache; each as a document, in a process of its own. Seconds of
processes that run beside other work are not comparable; the ratio of the last two is, where they ran in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import quantize as bench


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budgets", type=float, nargs=2, default=(5.5, 6.5))
    given = parser.parse_args()
    first, second = given.budgets
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench.write_calibration(folder)
        found = [
            run(folder, budget, given.tokens, cache)
            for budget, cache in ((first, "cache"), (second, "cache"), (second, "empty"))
        ]
    _, again, alone = found
    same = again["digest"] == alone["digest"]
    ratio = alone["cpu"] / again["cpu"]
    print(json.dumps({"same_bits": same, "cpu_alone_over_again": round(ratio, 1)}))
    if not same:
        raise SystemExit("the kept measurements gave another model")


def run(folder: Path, budget: float, tokens: int, cache: str) -> dict[str, Any]:
    """One document; its CPU seconds, and what its step says."""
    text = {"text_cols": ["text"], "strategy": "join", "max_seq_len": bench.LENGTH}
    load = {"data_name": "json", "data_files": "calibration.jsonl", "split": "train"}
    document = {
        "input_model": {"type": "HfModel", "model_path": str(bench.base().absolute())},
        "data_configs": [
            {"name": "text", "load_dataset_config": load, "pre_process_data_config": text}
            | {"type": "HuggingfaceContainer"}
        ],
        "passes": {
            "mixed": {
                "type": "SelectiveMixedPrecision",
                "data_config": "text",
                "bits_per_weight": budget,
                "calibration_tokens": tokens,
            }
        },
        "cache_dir": cache,
        "output_dir": f"out-{cache}-{budget}",
    }
    path = folder / "document.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    command = [sys.executable, "-m", "olive", "run", str(path)]
    here = Path.cwd()
    os.chdir(folder)
    try:
        done, used = bench.timed(command, dict(os.environ))
    finally:
        os.chdir(here)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    step = json.loads((folder / document["output_dir"] / "run.json").read_text())["steps"][0]
    kept = sum(path.stat().st_size for path in (folder / cache / "statistics").rglob("*") if path.is_file())
    line = {"budget": budget, "cache": cache, **used, **step["facts"]["statistics"], "kept_bytes": kept}
    print(json.dumps(line), flush=True)
    return line | {"digest": step["digest"]}


if __name__ == "__main__":
    main()
