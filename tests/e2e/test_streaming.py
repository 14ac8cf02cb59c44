"""The command line on data that is read as a stream, killed while tokens are written, with a tracker."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fault_kit import Fault, document, model, names, result, run, store, write, write_rows

from tiny import tiny_phi3

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks")


def prepared(folder: Path, **load: Any) -> Path:
    folder.mkdir()
    tiny_phi3(folder / "base")
    write_rows(folder)
    body = document(steps=4, passes=("lora",))
    body["data_configs"][0]["load_dataset_config"] |= load
    if importlib.util.find_spec("tensorboard"):
        body["passes"]["lora"]["training_args"]["report_to"] = "tensorboard"
    write(folder, body)
    return folder


def test_a_stream_killed_while_it_is_written_gives_the_same_model(tmp_path: Path) -> None:
    calm = prepared(tmp_path / "calm")
    done = run("run", "doc.json", cwd=calm)
    assert done.code == 0, done.said

    folder = prepared(tmp_path / "killed", streaming=True)
    planned = run("plan", "doc.json", cwd=folder)
    assert planned.code == 0, planned.said
    assert "read as a stream" in planned.out
    for at in (r"tokens/rows\.bin", r"tokens/index\.json\.tmp"):
        killed = run("run", "doc.json", cwd=folder, fault=Fault(at=at))
        assert killed.code == -signal.SIGKILL, killed.said
        (work,) = store(folder, "work")
        tokens = folder / ".olive-cache" / "work" / work / "tokens"
        assert "tokens.bin" in names(tokens)
        assert "index.json" not in names(tokens)
    done = run("run", "doc.json", cwd=folder)
    assert done.code == 0, done.said
    assert store(folder, "work") == []
    assert model(folder) == model(calm)
    steps = [result(where)["steps"][0] for where in (calm, folder)]
    assert steps[0]["key"] == steps[1]["key"]
    assert steps[1]["facts"]["streamed"] == ["train"]
    assert json.dumps(result(folder)).count("read as a stream") == 1
    if importlib.util.find_spec("tensorboard"):
        assert names(folder / "olive-output" / "tracking") == ["tensorboard"]
        again = run("run", "doc.json", cwd=folder)
        assert again.code == 0, again.said
