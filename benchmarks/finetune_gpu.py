"""Fine-tuning on one GPU: LoRA and QLoRA at the shape of Phi-3-mini or Llama-3-8B, random weights.

    python benchmarks/finetune_gpu.py lora [--plain] [--steps 6]
    python benchmarks/finetune_gpu.py qlora [--shape llama-8b] [--checkpointing] [--optim adamw_8bit]
    python benchmarks/finetune_gpu.py short [--plain]      # rows of Alpaca-like lengths

Rank 64 on all linear layers, no dropout, every token with a label. Ours goes through the pass's own training.
Plain is transformers + PEFT + SDPA, one sequence or row a forward pass, AdamW fused. The bf16 matrix rate
is measured beside it on products of the model's own shapes. Counted: 4 FLOPs a parameter and token, embedding
look-up left out; attention and the adapters' own products are not counted.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olive.config.workflow import Accelerator
from olive.hardware.memory import collect_seldom, exempt_libraries
from olive.hardware.probe import probe
from olive.models.seen import Seen
from olive.passes.base import PassContext
from olive.passes.finetune import attention
from olive.passes.finetune.base_weights import QuantisedLinear, linear_names
from olive.passes.finetune.lora import LoRA
from olive.passes.finetune.run import train_blocks
from olive.passes.finetune.trainer import PackedTrainer
from olive.passes.finetune.training_data import TrainingData
from olive.quantization.blockwise import quantise
from olive.store.journal import Journal

SHAPES: dict[str, dict[str, Any]] = {
    "phi3-mini": {
        "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 8192, "vocab_size": 32064, "pad_token_id": 0,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
    },
    "llama-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "pad_token_id": 0,
        "max_position_embeddings": 8192,
    },
}  # fmt: skip


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


@dataclass(frozen=True)
class Block:
    """A packed row."""

    ids: list[int]
    labels: list[int]
    lengths: list[int]


def blocks(count: int, tokens: int, vocabulary: int, short: bool) -> list[Block]:
    """``count`` rows of ``tokens``: one document each, or documents of Alpaca-like lengths."""
    draw = random.Random(0)
    made = []
    for _ in range(count):
        ids = [draw.randrange(10, vocabulary) for _ in range(tokens)]
        lengths, left = [], tokens
        while short and left > 0:
            # log-normal with a median of 60 and a mean of 85 tokens, as instruction data has
            lengths.append(min(left, max(12, int(draw.lognormvariate(4.1, 0.75)))))
            left -= lengths[-1]
        made.append(Block(ids, ids, lengths or [tokens]))
    return made


def base(shape: str, quantised: bool) -> Any:
    """A random model on the GPU in bfloat16; its linear layers in NF4 with double quantisation if asked."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention.register()
        )
    seen = Seen("nf4", 64, True, frozenset(linear_names(model)))
    for name, module in list(model.named_modules()):
        if quantised and name in seen.modules:
            weight = torch.randn(module.weight.shape, device="cuda", dtype=torch.bfloat16) * 0.02
            parent, _, last = name.rpartition(".")
            layer = QuantisedLinear(quantise(weight, seen.scheme), None, torch.bfloat16)
            setattr(model.get_submodule(parent), last, layer)
            del weight
    model = materialised(model)
    torch.cuda.empty_cache()
    return model


def materialised(model: Any) -> Any:
    """Give every tensor that is still on no device small random numbers on the GPU."""
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if value.is_meta:
                fresh = torch.ones if value.dim() == 1 else torch.randn
                made = fresh(value.shape, device="cuda", dtype=value.dtype)
                made = made if value.dim() == 1 else made.mul_(0.02)
                setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
        if hasattr(module, "inv_freq"):
            fixed = type(module)(module.config, device="cuda")
            module.inv_freq, module.original_inv_freq = fixed.inv_freq, fixed.inv_freq
    model.tie_weights()
    return model


def matrix_rate(shape: str, tokens: int) -> float:
    """FLOP/s of bf16 products: activations by the widest weight, both ways, the best of ten."""
    hidden, inner = SHAPES[shape]["hidden_size"], 2 * SHAPES[shape]["intermediate_size"]
    x, w, g = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16)
        for size in ((tokens, hidden), (inner, hidden), (tokens, inner))
    )
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(5):
            x @ w.t()
            g @ w
        torch.cuda.synchronize()
        best = max(best, 5 * 2 * 2 * tokens * hidden * inner / (time.perf_counter() - began))
    return best


def parameters(shape: str) -> int:
    """Numbers that take part in products."""
    s = SHAPES[shape]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    keys = hidden // s["num_attention_heads"] * s["num_key_value_heads"]
    layer = hidden * (hidden + 2 * keys) + hidden * hidden + 3 * hidden * inner
    return int(s["num_hidden_layers"] * layer + s["vocab_size"] * hidden)


def settings(rank: int) -> LoRA.Params:
    """Of the adapters, on both sides."""
    return LoRA.Params.model_validate(
        {
            "r": rank,
            "alpha": rank,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "train_data_config": "train",
        }
    )


def ours(options: argparse.Namespace, quantised: bool, short: bool) -> dict[str, Any]:
    """Tokens a second of the pass's own training, the first two steps not counted, and peak memory."""
    model = base(options.shape, quantised)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    wanted = settings(options.rank)
    from olive.models.artifact import Artifact, Kind

    tuned = LoRA().adapt(model, Artifact(kind=Kind.HF, path=Path("random"), digest="0" * 64), wanted)
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ctx = PassContext(
            out=folder, machine=probe(), accelerator=Accelerator(device="gpu"), target=Accelerator(), data={},
            base_dir=folder, progress=Silent(), journal=Journal(folder / "journal"),
        )  # fmt: skip
        given = {
            "max_steps": options.steps, "per_device_train_batch_size": options.batch, "learning_rate": 1e-4,
            "gradient_accumulation_steps": 1, "save_strategy": "no", "optim": options.optim,
        }  # fmt: skip
        if options.checkpointing:
            given["gradient_checkpointing"] = True
        rows = blocks(options.steps * options.batch, options.length, vocabulary, short)
        exempt_libraries()
        data = TrainingData(rows, [], str)
        curve, _ = train_blocks(tuned, given, ctx, "bfloat16", data, PackedTrainer)
    speeds = [point["tokens_per_second"] for point in curve.points][2:]
    return {
        "tokens_per_second": sorted(speeds)[len(speeds) // 2],
        "loss": curve.points[-1]["loss"],
        "resident": resident / 2**30,
        "peak": torch.cuda.max_memory_allocated() / 2**30,
        "fused": ctx.facts["fused_layers"],
        "cut": ctx.facts["micro_batch"],
    }


def plain(options: argparse.Namespace, short: bool) -> dict[str, Any]:
    """Tokens a second of transformers + PEFT with SDPA; short rows one at a time."""
    from peft import get_peft_model

    from olive.passes.finetune.lora import lora_config

    model = base(options.shape, False)
    model.set_attn_implementation("sdpa")
    wanted = settings(options.rank)
    tuned = get_peft_model(model, lora_config(wanted, "all-linear"))
    tuned.train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4, fused=True)
    rows = blocks(options.steps, options.length, SHAPES[options.shape]["vocab_size"], short)
    documents: list[list[int]] = []
    for row in rows:
        start = 0
        for length in row.lengths:
            documents.append(row.ids[start : start + length])
            start += length
    documents = documents[: 40 if short else options.steps]
    torch.cuda.reset_peak_memory_stats()
    done, began = 0, 0.0
    warm = 8 if short else 2
    for index, ids in enumerate(documents):
        if index == warm:
            torch.cuda.synchronize()
            began = time.perf_counter()
        batch = torch.tensor([ids], device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            tuned(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += len(ids) if index >= warm else 0
    torch.cuda.synchronize()
    return {
        "tokens_per_second": done / (time.perf_counter() - began),
        "peak": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure one case and print it beside the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=("lora", "qlora", "short"))
    parser.add_argument("--shape", choices=tuple(SHAPES), default="phi3-mini")
    parser.add_argument("--length", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--limit", type=float, help="GiB that the process may take, as on a smaller card")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    collect_seldom()
    options.length = options.length or (2048 if options.case == "qlora" else 4096)
    options.batch = options.batch or (2 if options.case == "qlora" else 1)
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit * 2**30 / total)
    rate = matrix_rate(options.shape, options.length * options.batch)
    need = 4 * parameters(options.shape)
    if options.plain:
        found = plain(options, options.case == "short")
    else:
        found = ours(options, options.case == "qlora", options.case == "short")
    share = found["tokens_per_second"] * need / rate
    who = "plain" if options.plain else "ours"
    print(
        f"{options.case} {options.shape} {options.batch} x {options.length} {who}: "
        f"{found['tokens_per_second']:.0f} tokens/s, {100 * share:.1f} % of {rate / 1e12:.0f} TFLOP/s, "
        f"peak {found['peak']:.2f} GiB; {found}",
        flush=True,
    )


if __name__ == "__main__":
    main()
