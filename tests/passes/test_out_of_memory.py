"""Memory that really runs out in a step: the step is done again in smaller passes, to the same result."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from olive.passes.finetune import memory
from olive.passes.finetune.cuts import cut, share
from tiny import tiny_llama

# limits what the process may allocate once training has begun, and lifts it when it is over
TRAIN = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_lora_training import params, train
from training_kit import data
from olive.errors import OliveError
from olive.hardware.memory import release_memory
from olive.passes.finetune import follow, memory, trainer

from olive.models import hf
import torch

hf.choose_products = lambda *machine: None  # oneDNN compiles code for each shape, which takes memory too
torch.backends.mkldnn.set_flags(False)
folder, base, room, checkpointing = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
memory.MOST_TOKENS["cpu"] = 16384
begin, end = follow.Follow.on_step_begin, follow.Follow.on_step_end

def used():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))

def on_step_begin(self, args, state, control, **more):
    if room and state.global_step == int(sys.argv[6]):
        release_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (used() + room, -1))
    return begin(self, args, state, control, **more)

def on_step_end(self, args, state, control, **more):
    resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
    return end(self, args, state, control, **more)

follow.Follow.on_step_begin, follow.Follow.on_step_end = on_step_begin, on_step_end
rows = folder / "rows.jsonl"
rows.write_text("\\n".join(json.dumps({"phrase": "rain " * 1000, "tone": str(i)}) for i in range(16)))
arguments = {"max_steps": 2, "gradient_accumulation_steps": 16}
if checkpointing != "auto":
    arguments["gradient_checkpointing"] = checkpointing == "true"
try:
    ctx = train(base, folder, data(rows, max_seq_len=1024), params(training_args=arguments))
except OliveError as error:
    print(json.dumps({"error": type(error).__name__, "said": str(error)}))
else:
    points = [point["loss"] for point in ctx.series["loss"]]
    print(json.dumps({"loss": points, "notes": ctx.progress.notes, "cut": ctx.facts["micro_batch"]}))
"""


def run(folder: Path, base: Path, room: int, checkpointing: str = "auto", step: int = 1) -> dict[str, Any]:
    import json

    folder.mkdir()
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(TRAIN),
            here,
            str(folder),
            str(base),
            str(room),
            checkpointing,
            str(step),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("memory") / "base", max_position_embeddings=2048)


def test_a_step_that_does_not_fit_is_done_again_in_smaller_passes(base: Path, tmp_path: Path) -> None:
    free, tight = run(tmp_path / "free", base, 0), run(tmp_path / "tight", base, 56 << 20)
    assert free["notes"] == []
    assert free["cut"]["tokens_of_a_pass"] == 16384
    assert any("memory ran out in step 2" in note for note in tight["notes"]), tight
    assert tight["cut"]["tokens_of_a_pass"] < 16384
    assert tight["loss"] == pytest.approx(free["loss"], abs=2e-6)


def test_a_row_that_does_not_fit_is_named(base: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "none", base, 1 << 20, "false", step=0)
    assert found["error"] == "OutOfMemory"
    assert "one row at a time" in found["said"]
    assert "gradient_checkpointing: false" in found["said"]


PHI3 = {
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def choose(free: float, longest: int = 4096, **more: Any) -> memory.Passes:
    return memory.choose(
        PHI3, width=2, free=int(free * 2**30), trained=89_000_000, longest=longest, device="gpu", **more
    )


def test_activations_are_computed_twice_only_where_memory_needs_it() -> None:
    assert choose(70) == memory.Passes(8192, False)
    assert not choose(20).checkpointing
    assert choose(10).checkpointing
    assert choose(10).tokens == 8192
    assert choose(10, longest=1024) == memory.Passes(choose(10, longest=1024).tokens, False)
    assert not choose(10, checkpointing=False).checkpointing
    assert choose(70, checkpointing=True).checkpointing


@pytest.mark.parametrize("budget", [1, 100, 1024])
def test_every_row_is_in_one_pass(budget: int) -> None:
    lengths = [(7 * i) % 90 + 1 for i in range(50)]
    passes = cut(lengths, budget)
    assert sorted(row for part in passes for row in part) == list(range(50))
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget * 1.02 for part in passes)
    parts = share(lengths, 4)
    assert sorted(row for part in parts for row in part) == list(range(50))
    tokens = [sum(lengths[i] for i in part) for part in parts]
    assert max(tokens) - min(tokens) <= max(lengths)
