"""AutoRound on tiny models: what it learns, what is stored, and what a killed run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olive.models.hf import load_model
from olive.passes.quantize import calibration
from passes_kit import run
from tiny import tiny_llama, tiny_phi3
from training_kit import data, rows

GIVEN = {"calibration_tokens": 800, "data_config": "train", "iters": 20, "batch_size": 8}
_KILLED = """
import os, signal, sys
from pathlib import Path
from olive.passes.quantize.auto_round import AutoRound
from passes_kit import run
plain = AutoRound._layer
def killed(self, stream, number, *rest):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, stream, number, *rest)
AutoRound._layer = killed
run("AutoRound", Path(sys.argv[1]), Path(sys.argv[2]), calibration_tokens=800, data_config="train", iters=20)
"""


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_phi3(tmp_path_factory.mktemp("phi3"), initializer_range=0.2)


def distance(source: Path, made: Path, folder: Path) -> float:
    """Mean KL of next-token distributions on rows that were not calibrated on, nat."""
    held_out = calibration.read(data(rows(folder, 160)), source, folder, tokens=1500, seed=5)
    full, other = load_model(source, dtype="float32"), load_model(made, dtype="float32")
    total = 0.0
    with torch.no_grad():
        for row in held_out.rows[:30]:
            ids = torch.tensor([list(row)])
            p, q = full(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
    return total


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("start", ["extremes", "search"])
def test_learning_takes_error_off_the_model(phi3: Path, tmp_path: Path, start: str, sym: bool) -> None:
    plain = run("Rtn", phi3, tmp_path / "rtn", sym=sym)
    ctx = run("AutoRound", phi3, tmp_path / "learned", start=start, sym=sym, **GIVEN)
    table = ctx.facts["layers"]
    assert len(table) == 8
    assert all(row["loss_after"] < row["loss_before"] for row in table)
    assert distance(phi3, ctx.out, tmp_path) < 0.9 * distance(phi3, plain.out, tmp_path)


def test_separate_projections_on_unchanged_inputs(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "llama", initializer_range=0.2, tie_word_embeddings=False)
    plain = run("Rtn", source, tmp_path / "rtn")
    ctx = run("AutoRound", source, tmp_path / "learned", enable_quanted_input=False, **GIVEN)
    assert distance(source, ctx.out, tmp_path) < distance(source, plain.out, tmp_path)


def test_a_run_after_sigkill_gives_the_same_bytes(phi3: Path, tmp_path: Path) -> None:
    whole = run("AutoRound", phi3, tmp_path / "whole", **GIVEN)
    command = [sys.executable, "-c", _KILLED, str(phi3), str(tmp_path / "killed")]
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    resumed = run("AutoRound", phi3, tmp_path / "killed", **GIVEN)
    assert resumed.facts["layers_from_journal"] == 1
    ours, theirs = (load_file(ctx.out / "model.safetensors") for ctx in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
