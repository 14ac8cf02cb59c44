"""Peak memory and time of making training blocks in memory and as a stream, of the same synthetic data.

    python benchmarks/streaming.py [--megabytes 200] [--only stream] [--strategy pack]

Rows are instructions and answers of made-up words with Zipf's frequencies; the tokenizer is a byte-level BPE
of 16,000 tokens trained on them. Each way runs in a process of its own; digests over all blocks must agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from array import array
from itertools import accumulate
from pathlib import Path

from olive.config.workflow import DataConfig
from olive.data import blocks, rows, split, stream
from olive.data.tokens import load


def make_rows(path: Path, size: int) -> None:
    """Write ``size`` bytes of JSON Lines."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = list(accumulate(1 / (rank + 2) for rank in range(len(words))))
    with path.open("w", encoding="utf-8") as file:
        written = 0
        while written < size:
            text = draw.choices(words, cum_weights=weights, k=20_000)
            lines, place = [], 0
            while place < len(text) - 300:
                asked, answered = draw.randint(5, 60), draw.randint(5, 240)
                row = {
                    "instruction": " ".join(text[place : place + asked]),
                    "output": " ".join(text[place + asked : place + asked + answered]),
                }
                place += asked + answered
                lines.append(json.dumps(row) + "\n")
            written += file.write("".join(lines))


def make_tokenizer(folder: Path, data: Path) -> None:
    """Train a byte-level BPE on the first rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    with data.open(encoding="utf-8") as file:
        texts = [" ".join(json.loads(file.readline()).values()) for _ in range(3000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')


def measure(way: str, folder: Path, strategy: str) -> None:
    """In a process of its own: make the blocks, read all of them once, print the figures."""
    config = DataConfig.model_validate(
        {
            "name": "train",
            "load_dataset_config": {"data_name": "json", "data_files": "rows.jsonl", "split": "train"},
            "pre_process_data_config": {
                "text_template": "### {instruction}\n{output}",
                "train_on": "completion",
                "strategy": strategy,
                "max_seq_len": 1024,
            },
        }
    )
    tokenizer, pre = load(folder / "model"), config.pre_process_data_config
    before, began = _peak(), time.perf_counter()
    if way == "stream":
        made, held = stream.build(config, folder, tokenizer, folder / "tokens", seed=0, eval_size=1000)
    else:
        read = rows.read(config, folder)
        train, others = split.split_places(read, 1000, 0, pre)
        made = blocks.build([read[i] for i in train], pre, tokenizer, 0, train)
        held = blocks.build_held_out([read[i] for i in others], pre, tokenizer, 0, others)
    built, digest = time.perf_counter(), hashlib.sha256()
    for part in (made, held):
        for block in part.blocks if part else ():
            digest.update(array("q", [*block.ids, *block.labels, *block.lengths]).tobytes())
    print(
        json.dumps(
            {
                "rows": made.rows + (held.rows if held else 0),
                "blocks": len(made),
                "tokens": made.tokens,
                "peak": _peak(),
                "before": before,
                "seconds": built - began,
                "read": time.perf_counter() - built,
                "digest": digest.hexdigest(),
            }
        )
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--only", choices=["memory", "stream"])
    parser.add_argument("--strategy", default="pack")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args.strategy)
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_rows(folder / "rows.jsonl", args.megabytes * 10**6)
        make_tokenizer(folder / "model", folder / "rows.jsonl")
        size = (folder / "rows.jsonl").stat().st_size
        for way in [args.only] if args.only else ["memory", "stream"]:
            command = [sys.executable, __file__, "--strategy", args.strategy, "--measure", way, scratch]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{way}: ended with {done.returncode}: {done.stderr[-300:]}")
                continue
            found[way] = one = json.loads(done.stdout)
            print(
                f"{way:7}{size / 1e6:8.0f} MB of JSON Lines, {one['rows']:,} rows, {one['tokens']:,} tokens, "
                f"{one['blocks']:,} blocks: peak {one['peak'] / 1e6:,.0f} MB "
                f"({(one['peak'] - one['before']) / size:.2f} bytes a byte of data), "
                f"{one['seconds']:.1f} s, all blocks read in {one['read']:.1f} s",
                flush=True,
            )
    if len(found) == 2:
        memory, streamed = found["memory"], found["stream"]
        same = memory["digest"] == streamed["digest"]
        print(f"the stream takes {streamed['peak'] / memory['peak']:.3f} of the memory; same blocks: {same}")
        return 0 if same else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
