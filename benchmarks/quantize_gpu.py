"""GPTQ on one GPU at the shape of Llama-3-8B: random weights, random tokens, the pass as a document runs it.

    python benchmarks/quantize_gpu.py [--layers 32] [--rows 128] [--length 2048] [--set drift=0]

Prints seconds of the pass (reading the weights, calibration, rounding, journal, the folder written), the most
GPU memory it held beside one decoder layer in bfloat16, and what forward passes and second moments alone
would take at the GPU's measured bf16 rate: each token through each matrix once for the model as it is and
once for the unchanged one (6.7 PFLOP at 32 layers), and the moments' and the drift's products (6.6).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from finetune_gpu import SHAPES, Silent
from safetensors.torch import save_file

from olive.config.workflow import Accelerator, DataConfig
from olive.hardware.memory import exempt_libraries
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.quantize import calibration
from olive.passes.quantize.calibration import Calibration
from olive.passes.quantize.gptq import Gptq
from olive.store.journal import Journal


def write_model(folder: Path, layers: int) -> dict[str, Any]:
    """A llama of random bf16 weights, a file a layer; returns its config."""
    shape = SHAPES["llama-8b"] | {"num_hidden_layers": layers}
    config = shape | {
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02).cpu()

    table = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        table.update(dict.fromkeys(tensors, name))

    for number in range(layers):
        prefix = f"model.layers.{number}"
        made = {f"{prefix}.{name}.weight": random(*size) for name, size in matrices.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{prefix}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"layer-{number}.safetensors", made)
    ends = {
        "model.embed_tokens.weight": random(shape["vocab_size"], hidden) * 50,
        "lm_head.weight": random(shape["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    save("ends.safetensors", ends)
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.cuda.empty_cache()
    return config


class Memory(Silent):
    """Prints what the GPU holds after each layer, and the most it held so far."""

    began = 0.0

    def start(self, task: str, total: int | None = None) -> None:
        """The clock starts."""
        self.began = time.perf_counter()

    def update(self, done: int, **fields: float | str) -> None:
        """One line a layer."""
        held, most = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        seconds = time.perf_counter() - self.began
        print(f"layer {done} at {seconds:.2f} s: {held:.2f} GiB held, {most:.2f} at most", flush=True)


def rate() -> float:
    """FLOP/s of a bf16 product of the layers' own shape."""
    a = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(100):
        a @ b
    torch.cuda.synchronize()
    return 100 * 2.0 * 8192 * 4096 * 14336 / (time.perf_counter() - began)


def main() -> None:
    """Make the model, run the pass, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--profile", action="store_true", help="print where the GPU's and the host's time went"
    )
    given = parser.parse_args()
    tokens = given.rows * given.length
    settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in given.set)}
    params = Gptq.Params.model_validate({"data_config": "rows", "calibration_tokens": tokens} | settings)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 128000, (given.rows, given.length), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name in ("model", "out", "journal"):
            (folder / name).mkdir()
        began = time.perf_counter()
        write_model(folder / "model", given.layers)
        print(f"model written in {time.perf_counter() - began:.1f} s", flush=True)
        speed = rate()
        gpu = Accelerator(device="gpu", execution_providers=("CUDAExecutionProvider",))
        none = {"name": "rows", "load_dataset_config": {"data_name": "json"}}
        ctx = PassContext(
            out=folder / "out", machine=probe(), accelerator=gpu, target=gpu,
            data={"rows": DataConfig.model_validate(none)},
            base_dir=folder, progress=Memory(), journal=Journal(folder / "journal"),
        )  # fmt: skip
        exempt_libraries()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        calibrated = Calibration(tuple(map(tuple, rows)))
        with patch.object(calibration, "read", lambda *_: calibrated):
            source = Artifact(kind=Kind.HF, path=folder / "model", digest="0" * 64)
            if given.profile:
                profiled(lambda: Gptq().run(source, params, ctx))
            else:
                Gptq().run(source, params, ctx)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / 2**30
        for row in ctx.facts["layers"][:7]:
            print(row)
    layer = 218.1e6
    forward = 2 * 2 * layer * tokens * given.layers * (1 if params.drift else 0.5)
    moments = tokens * 255.9e6 * given.layers * (3 if params.drift else 1)
    limit = (forward + moments) / speed
    print(f"bf16 rate {speed / 1e12:.0f} TFLOP/s")
    print(
        f"Gptq, {given.layers} layers, {tokens} tokens: {seconds:.1f} s, "
        f"{seconds / limit:.2f}x the products alone"
    )
    print(f"peak {peak:.2f} GiB, {peak - 2 * layer / 2**30:.2f} GiB over one layer in bfloat16")


def profiled(work: Any) -> None:
    """Run under the profiler; the largest items by GPU time and by host time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
