"""Export of a genai bundle: ours against genai's own builder, whole processes, and against the machine.

    python benchmarks/export.py [--params '{"algo_config": "k_quant_mixed"}'] [--repeat 3] [--generate]
    python benchmarks/export.py --shape phi3-3.8b --layers 6
    python benchmarks/export.py --shape phi3-3.8b --only ours

Default: the example's base (135M, float32; OLIVE_BASE names another folder) to the builder's default int4.
Each export is a process from its start to its end, the two in turn; figures are the medians. A `--shape` is a
folder of random bfloat16 weights, made in a temporary folder. The limit is what the bytes of model and
bundle take at the speed this machine reads them from the page cache and writes them to a file.
`--generate` also decodes 128 tokens greedily with either bundle, and says which share of the memory's
bandwidth their weights were read at. `--builder-params` gives the builder other options than ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "phi3-tone"
BASE = Path(os.environ.get("OLIVE_BASE", EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini"))
SHAPES: dict[str, dict[str, Any]] = {
    "phi3-3.8b": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
        "num_hidden_layers": 32, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
TOKENS = 128


@dataclass(frozen=True)
class Used:
    """What a process took.

    Attributes:
        wall, cpu: seconds.
        peak: resident bytes.
    """

    wall: float
    cpu: float
    peak: int


class Silent:
    """A progress that says nothing."""

    def start(self, task: str, total: int | None = None) -> None:
        """Nothing."""

    def update(self, done: int, **fields: float | str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def note(self, message: str) -> None:
        """Nothing."""


def export_ours(source: Path, out: Path, params: dict[str, Any]) -> None:
    """The pass as a run calls it; in a process of its own."""
    from olive.hardware.memory import collect_seldom

    collect_seldom()
    from olive.config.workflow import Accelerator
    from olive.hardware.probe import probe
    from olive.models.artifact import Artifact, Kind
    from olive.passes.base import PassContext
    from olive.passes.export.model_builder import ModelBuilder
    from olive.store.journal import Journal

    out.mkdir(parents=True)
    target = Accelerator(device="cpu", execution_providers=("CPUExecutionProvider",))
    context = PassContext(
        out=out, machine=probe(), accelerator=target, target=target, data={}, base_dir=out,
        progress=Silent(), journal=Journal(out.parent / f"{out.name}-journal"),
    )  # fmt: skip
    model = Artifact(kind=Kind.HF, path=source, digest="0" * 64)
    ModelBuilder().run(model, ModelBuilder.Params.model_validate(params), context)
    print(json.dumps({name: context.facts[name] for name in ("weights", "quantiser")}))


def command(who: str, source: Path, out: Path, params: dict[str, Any]) -> list[str]:
    """What exports ``source``."""
    if who == "ours":
        return [sys.executable, __file__, "--child", str(source), str(out), json.dumps(params)]
    from olive.models.hf import describe
    from olive.passes.export.model_builder import ModelBuilder, builder_options, tied

    wanted = ModelBuilder.Params.model_validate(params)
    options = builder_options(wanted, tied(describe(source)))
    return [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out), "-p",
        wanted.precision, "-e", "cpu", "-c", f"{out}-cache", "--extra_options",
        *(f"{name}={text}" for name, text in options.items()),
    ]  # fmt: skip


# A peak counts what the process shared with its parent before its own program began: a small one between.
_BETWEEN = """
import json, os, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
wall = time.perf_counter() - start
import resource
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024], file)
sys.exit(code)
"""


def measured(line: list[str]) -> Used:
    """Run a process to its end.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "used.json")
        done = subprocess.run(
            [sys.executable, "-c", _BETWEEN, str(path), *line], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-3000:])
        return Used(*json.loads(path.read_text()))


def make(shape: str, layers: int | None, folder: Path) -> Path:
    """A folder of random weights; all matrices are cut from the same numbers, which costs no time."""
    import torch

    from olive.models.hf import copy_tokenizer
    from olive.models.stream import write

    folder.mkdir()
    config = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    (folder / "config.json").write_text(json.dumps(config))
    copy_tokenizer(BASE, folder)
    hidden, inner, vocabulary = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)},
        {"lm_head.weight": (vocabulary, hidden)},
    ]
    for number in range(config["num_hidden_layers"]):
        shapes = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "self_attn.qkv_proj": (3 * hidden, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        files.append({f"model.layers.{number}.{name}.weight": size for name, size in shapes.items()})
    for number, sizes in enumerate(files):

        def load(name: str, sizes: dict[str, tuple[int, ...]] = sizes) -> torch.Tensor:
            size = sizes[name]
            if len(size) == 1:
                return torch.ones(size, dtype=torch.bfloat16)
            count = size[0] * size[1]
            return numbers.repeat(-(-count // len(numbers)))[:count].view(size)

        write(
            folder / f"part-{number:03}.safetensors", {name: ("BF16", s) for name, s in sizes.items()}, load
        )
    names = {name: f"part-{number:03}.safetensors" for number, sizes in enumerate(files) for name in sizes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def bandwidths(folder: Path) -> tuple[float, float, float]:
    """Bytes a second: memory copied (read and written), a cached file read, a file written."""
    import numpy as np

    size = 256 << 20
    one, other = np.ones(size, np.uint8), np.empty(size, np.uint8)
    copies, reads, writes = [], [], []
    path = folder / "bytes"
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(other, one)
        copies.append(time.perf_counter() - start)
        start = time.perf_counter()
        path.write_bytes(one.data)
        writes.append(time.perf_counter() - start)
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            file.readinto(other)  # type: ignore[attr-defined]
        reads.append(time.perf_counter() - start)
        path.unlink()
    return 2 * size / min(copies), size / min(reads), size / min(writes)


def generate(bundle: Path) -> float:
    """Tokens a second of greedy decoding, after the prompt; the better of two."""
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(str(bundle))
    best = 0.0
    for _ in range(2):
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=TOKENS + 8, min_length=TOKENS + 8, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(np.arange(10, 17, dtype=np.int32))
        generator.generate_next_token()
        start = time.perf_counter()
        count = 0
        while count < TOKENS - 1 and not generator.is_done():
            generator.generate_next_token()
            count += 1
        best = max(best, count / (time.perf_counter() - start))
    return best


def read_a_token(bundle: Path) -> int:
    """Bytes of weights that decoding a token reads; of an embedding of its own that is a row, left out."""
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if node.op_type.startswith("Gather")}
    total = 0
    for value in graph.initializer:
        sizes = {entry.key: entry.value for entry in value.external_data}
        if value.name not in gathered and "cache" not in value.name:
            total += int(sizes.get("length", len(value.raw_data)))
    return total


@contextmanager
def source(asked: argparse.Namespace, folder: Path) -> Iterator[Path]:
    """The model to export."""
    if asked.shape is None:
        yield BASE
        return
    made = make(asked.shape, asked.layers, folder / "source")
    try:
        yield made
    finally:
        shutil.rmtree(made)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        export_ours(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
        return
    if sys.argv[1:2] == ["--tokens"]:
        print(generate(Path(sys.argv[2])))
        return
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    reader.add_argument("--params", type=json.loads, default={})
    reader.add_argument("--builder-params", type=json.loads)
    reader.add_argument("--shape", choices=SHAPES)
    reader.add_argument("--layers", type=int)
    reader.add_argument("--repeat", type=int, default=1)
    reader.add_argument("--only", choices=("ours", "builder"))
    reader.add_argument("--generate", action="store_true")
    asked = reader.parse_args()
    params = {"precision": "int4"} | asked.params
    theirs = params if asked.builder_params is None else {"precision": "int4"} | asked.builder_params
    turns = [who for who in ("ours", "builder") if asked.only in (None, who)]
    with (
        tempfile.TemporaryDirectory(prefix="olive-export-") as scratch,
        source(asked, Path(scratch)) as model,
    ):
        folder = Path(scratch)
        copied, read, written = bandwidths(folder)
        used: dict[str, list[Used]] = {who: [] for who in turns}
        for _ in range(asked.repeat):
            for who in turns:
                shutil.rmtree(folder / who, ignore_errors=True)
                line = command(who, model, folder / who, params if who == "ours" else theirs)
                used[who].append(measured(line))
        before = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        after = sum(path.stat().st_size for path in (folder / turns[0]).glob("model.onnx*"))
        limit = before / read + after / written
        print(f"{model.name}: {before / 1e9:.2f} GB of weights to {after / 1e9:.2f} GB")
        walls = {}
        for who in turns:
            wall, cpu, peak = (
                statistics.median(getattr(one, field) for one in used[who])
                for field in ("wall", "cpu", "peak")
            )
            walls[who] = wall, cpu
            print(f"{who:8} {wall:7.1f} s wall {cpu:7.1f} s CPU {peak / 1e9:6.2f} GB peak")
        if len(turns) == 2:
            ratios = [theirs / ours for ours, theirs in zip(walls["ours"], walls["builder"], strict=True)]
            print(f"ratio    {ratios[0]:7.2f}   wall {ratios[1]:7.2f}   CPU")
        print(f"limit    {limit:7.1f} s at {read / 1e9:.1f} GB/s read, {written / 1e9:.1f} GB/s written")
        if asked.generate:
            for who in turns:
                line = [sys.executable, __file__, "--tokens", str(folder / who)]
                speed = float(subprocess.run(line, check=True, capture_output=True).stdout)
                weights = read_a_token(folder / who)
                print(
                    f"{who:8} {speed:7.1f} tokens/s {weights / 1e6:8.1f} MB a token: "
                    f"{speed * weights / copied:.0%} of {copied / 1e9:.1f} GB/s"
                )


if __name__ == "__main__":
    main()
