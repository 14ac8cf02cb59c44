"""What a measured choice of bits gives over the k_quant_mixed rule at its size, with one quantiser below.

    python benchmarks/mixed.py [--quantiser KQuant] [--blocks 5] [--tokens 4096]

Base, texts, units as in benchmarks/quantize.py; blocks of 32 with zero points, head and embedding untouched
in both. The standard error of the ratio is paired, over tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import quantize as bench


def run(name: str, params: dict[str, Any], model: Path, out: Path, calibration: Path) -> dict[str, Any]:
    """One pass in this process; its facts."""
    from olive.config.workflow import Accelerator, DataConfig
    from olive.hardware.probe import probe
    from olive.models.artifact import Artifact, Kind
    from olive.passes.base import PassContext
    from olive.passes.registry import resolve
    from olive.store.journal import Journal

    out.mkdir(parents=True)
    load = {"data_name": "json", "data_files": str(calibration), "split": "train"}
    text = {"text_cols": ["text"], "strategy": "join", "max_seq_len": bench.LENGTH}
    config = DataConfig.model_validate(
        {"name": "text", "load_dataset_config": load, "pre_process_data_config": text}
    )
    ctx = PassContext(
        out=out,
        machine=probe(),
        accelerator=Accelerator(),
        target=Accelerator(),
        data={"text": config},
        base_dir=out,
        progress=bench._Silent(),
        journal=Journal(out.parent / f"{out.name}-journal"),
    )
    technique = resolve(name)
    given = technique.Params.model_validate(params)
    technique().run(Artifact(kind=Kind.HF, path=model, digest="0" * 64), given, ctx)
    return ctx.facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quantiser", default="KQuant")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--group-sizes", type=int, nargs="*", help="blocks to choose from; default: all")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        compare(given, Path(scratch))


def compare(given: argparse.Namespace, folder: Path) -> None:
    calibration = bench.write_calibration(folder)
    ids = bench.blocks(given.blocks)
    reference, _ = bench.measure(bench.base(), ids, None)
    choices: dict[str, dict[str, Any]] = {"k_quant_mixed": {"algorithm": "k_quant_mixed"}}
    rule: bench.Measured | None = None
    for name in ("k_quant_mixed", "kl"):
        facts = run(
            "SelectiveMixedPrecision", choices[name], bench.base(), folder / f"{name}-choice", calibration
        )
        if rule is None:
            more: dict[str, Any] = {"data_config": "text", "calibration_tokens": given.tokens}
            more |= {} if given.group_sizes is None else {"group_sizes": given.group_sizes}
            choices["kl"] = {"algorithm": "kl", "size": facts["bytes"]} | more
        own = {"data_config": "text"} if given.quantiser in ("Gptq", "Awq") else {}
        run(given.quantiser, own, folder / f"{name}-choice", folder / name, calibration)
        _, found = bench.measure(folder / name, ids, reference)
        rule = rule or found
        kl, count = float(found.kl.mean()), len(found.kl)
        ratio = kl / float(rule.kl.mean())
        spread = float((found.kl - ratio * rule.kl).std()) / math.sqrt(count) / float(rule.kl.mean())
        line = {
            "choice": name,
            "bytes": facts["bytes"],
            "bits_per_weight": facts["bits_per_weight"],
            "settings": facts["settings"],
            "kl": round(kl, 5),
            "se": round(float(found.kl.std()) / math.sqrt(count), 5),
            "of_rule": round(ratio, 4),
            "paired_se": round(spread, 4),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
