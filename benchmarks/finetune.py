"""Training speed of the LoRA pass against plain Transformers + PEFT, and against this machine's matrix rate.

    python benchmarks/finetune.py [--rounds 3] [--rows 320] [--plain-rows 24] [--length 1024]

Both train the example's base on rows of the example's data (about 24 tokens each), every token with a label,
rank 64 on qkv_proj and o_proj, dropout 0.1, as the published document has it. Plain takes one row a forward
pass and an optimizer step every 4 rows, in float32. Ours goes through the pass itself, rows packed to 1,024
tokens: once in float32, and where this CPU multiplies bfloat16 also in the dtype the pass chooses by itself.
The matrix rate of either dtype is measured beside them, on products of the model's own shapes, since the
machine is shared: torch's own float32 products as plain training finds them, and those the pass takes.
Counted as needed: 4 FLOPs a parameter and token, embedding look-up left out, and causal attention inside each
document. Prints medians over the rounds. With ``--length`` the rows are joined to documents
of that many tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from olive.config.workflow import Accelerator, DataConfig
from olive.hardware.probe import probe, training_dtype
from olive.hardware.products import choose_products
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.finetune.lora import LoRA
from olive.store.journal import Journal

EXAMPLE = Path(__file__).parents[1] / "examples" / "phi3-tone"
BASE = EXAMPLE / "model-cache" / "microsoft" / "phi-3-mini"
TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"
TARGETS = ("qkv_proj", "o_proj")
RANK = 64


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


def matrix_rate(dtype: torch.dtype, seconds: float = 1.5, tokens: int = 1024) -> float:
    """FLOP/s of products as training makes them: activations by the widest weight, both ways."""
    config = json.loads((BASE / "config.json").read_text())
    hidden, inner = config["hidden_size"], 2 * config["intermediate_size"]
    x, weight, grad, forward, backward = (
        torch.randn(shape).to(dtype)
        for shape in ((tokens, hidden), (inner, hidden), (tokens, inner), (tokens, inner), (tokens, hidden))
    )
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        for _ in range(5):
            torch.mm(x, weight.t(), out=forward)
            torch.mm(grad, weight, out=backward)
        best = max(best, 5 * 2 * 2 * tokens * hidden * inner / (time.perf_counter() - start))
    return best


def flops_a_token(lengths: list[int]) -> float:
    """What one token needs on average: frozen and low-rank weights, head, attention in its document."""
    config = json.loads((BASE / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    key_width = hidden // heads * config["num_key_value_heads"]
    qkv = hidden * (hidden + 2 * key_width)
    weights = layers * (qkv + hidden * hidden + 3 * hidden * inner) + config["vocab_size"] * hidden
    weights += layers * RANK * ((hidden + hidden + 2 * key_width) + (hidden + hidden))
    # two products of length * length / 2 * hidden forward, four backward
    attention = layers * 6 * hidden * sum(n * n for n in lengths) / sum(lengths)
    return 4 * weights + attention


def rows_file(folder: Path, count: int) -> Path:
    """The first ``count`` training rows."""
    lines = (EXAMPLE / "dataset" / "dataset-classification.json").read_text().splitlines()[:count]
    path = folder / "rows.json"
    path.write_text("\n".join(lines) + "\n")
    return path


def data(path: Path, length: int) -> DataConfig:
    """The rows packed to 1,024 tokens, or joined to documents of ``length``."""
    return DataConfig.model_validate(
        {
            "name": "train",
            "load_dataset_config": {"data_name": "json", "data_files": str(path), "split": "train"},
            "pre_process_data_config": {
                "text_template": TEMPLATE,
                "strategy": "join" if length else "pack",
                "max_seq_len": length or 1024,
            },
        }
    )


def ours(count: int, dtype: str, length: int) -> tuple[float, list[int]]:
    """Tokens a second of the pass, all steps counted, and the lengths of its documents."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = data(rows_file(folder, count), length)
        out = folder / "out"
        out.mkdir()
        ctx = PassContext(
            out=out,
            machine=probe(),
            accelerator=Accelerator(),
            target=Accelerator(),
            data={"train": config},
            base_dir=folder,
            progress=Silent(),
            journal=Journal(folder / "journal"),
        )
        wanted = LoRA.Params.model_validate(
            {
                "r": RANK,
                "alpha": 64,
                "lora_dropout": 0.1,
                "target_modules": TARGETS,
                "train_data_config": "train",
                "torch_dtype": dtype,
                "training_args": {"seed": 0, "num_train_epochs": 1, "learning_rate": 1e-4},
            }
        )
        LoRA().run(Artifact(kind=Kind.HF, path=BASE, digest="0" * 64), wanted, ctx)
        return float(ctx.facts["tokens_per_second"]), [length] if length else lengths(count)


def lengths(count: int) -> list[int]:
    """Tokens of each row."""
    return [len(ids) for ids in encoded(count, 0)]


def encoded(count: int, length: int) -> list[list[int]]:
    """The first ``count`` rows, rendered and tokenised as both sides train on them."""
    from olive.data import blocks, rows, tokens

    with tempfile.TemporaryDirectory() as name:
        config = data(rows_file(Path(name), count), length)
        read = rows.read(config, Path(name))
    pre = config.pre_process_data_config
    if not length:
        pre = pre.model_copy(update={"strategy": "line-by-line"})
    return [list(block.ids) for block in blocks.build(read, pre, tokens.load(BASE), 0)]


def plain(count: int, length: int) -> float:
    """Tokens a second of Transformers + PEFT, one row at a time, after two rows of warm-up."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=64, lora_dropout=0.1, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = [torch.tensor([ids]) for ids in encoded(count + 2, 0)]
    if length:
        rows = [torch.tensor([ids]) for ids in encoded(60 * (count + 2), length)[: count + 2]]
    done, began = 0, 0.0
    for index, ids in enumerate(rows):
        if index == 2:
            began = time.perf_counter()
        (model(input_ids=ids, labels=ids).loss / 4).backward()
        if index % 4 == 1:
            optimizer.step()
            optimizer.zero_grad()
        done += ids.numel() if index >= 2 else 0
    return done / (time.perf_counter() - began)


def main() -> None:
    """Measure in turn, and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--plain-rows", type=int, default=24)
    parser.add_argument(
        "--length", type=int, default=0, help="tokens of a document; 0 for the rows as they are"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    machine = probe()
    torch.set_num_threads(machine.cores)
    dtypes = list(dict.fromkeys(["float32", training_dtype(machine, "cpu")]))
    ratios: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    shares: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for index in range(options.rounds):
        with products_of_torch():
            slow = plain(options.plain_rows, options.length)
            torch_rate = matrix_rate(torch.float32)
        print(f"round {index}: plain {slow:.1f} tokens/s, torch's float32 {torch_rate / 1e9:.0f} GFLOP/s")
        choose_products(machine.cpu, machine.cpu_features)
        for dtype in dtypes:
            before = matrix_rate(getattr(torch, dtype))
            fast, sizes = ours(options.rows, dtype, options.length)
            rate = (before + matrix_rate(getattr(torch, dtype))) / 2
            need = flops_a_token(sizes)
            ratios[dtype].append(fast / slow)
            shares[dtype].append(fast * need / rate)
            print(
                f"  ours in {dtype}: {fast:.1f} tokens/s ({fast / slow:.2f}x); "
                f"{need / 1e9:.3f} GFLOP a token, "
                f"{100 * shares[dtype][-1]:.1f} % of {rate / 1e9:.0f} GFLOP/s, "
                f"{100 * fast * need / torch_rate:.0f} % of torch's float32 rate",
                flush=True,
            )
    for dtype in dtypes:
        print(
            f"median, {dtype}: {statistics.median(ratios[dtype]):.2f}x plain Transformers + PEFT, "
            f"{100 * statistics.median(shares[dtype]):.1f} % of its matrix rate"
        )


@contextmanager
def products_of_torch() -> Iterator[None]:
    """Float32 products as torch computes them by default."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)
    was = getattr(settings, "fp32_precision", None)
    if was is not None:
        settings.fp32_precision = "none"
    yield
    if was is not None:
        settings.fp32_precision = was


if __name__ == "__main__":
    main()
