"""What a key is made of, what is missing from the machine, and what is refused before anything starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_kit import Done, cold, copy, document, ended, run, write, write_rows

import olive
from tiny import tiny_phi3

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")
EXTRA = (
    *(
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "torchmetrics",
        "numpy",
        "pandas",
        "pyarrow",
    ),
    *("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai", "huggingface-hub", "sklearn", "scikit-learn"),
)
HIDE = '''
"""Hide distributions and their modules, as if they were not installed."""

import importlib.metadata
import os
import sys

hidden = set(os.environ["HIDDEN"].split(","))
found = importlib.metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(cls, name)


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hides = name.split(".")[0].replace("_", "-") in hidden
        return None if hides else self.finder.find_spec(name, path, target)


importlib.metadata.Distribution.from_name = classmethod(from_name)
sys.meta_path[:] = map(Hiding, sys.meta_path)
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which a short document ran."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_phi3(folder / "base")
    write_rows(folder)
    write(folder, document(steps=2, passes=["lora", "merge"]))
    done = run("run", "doc.json", cwd=folder)
    assert done.code == 0, done.said
    return folder


def plain(text: str) -> str:
    return " ".join(text.split())


def explained(folder: Path, *path: Path, **environment: str) -> str:
    done = ended(cold("cache", "explain", "--config", "doc.json", cwd=folder, path=path, **environment))
    assert done.code == 0, done.said
    return done.out


def test_changed_source_is_a_miss_and_is_named(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(Path(olive.__file__).parent, source / "olive")
    assert explained(trained, source).splitlines()[-1].startswith("merge: hit")
    for changed, label in (
        ("passes/finetune/loss.py", "pass"),
        ("models/hf.py", "models"),
        ("data/rows.py", "data"),
    ):
        path = source / "olive" / changed
        text = path.read_text()
        path.write_text(text + "\n# changed\n")
        out = explained(trained, source)
        assert "lora: miss" in out
        differences = [line for line in out.splitlines() if " -> " in line]
        assert len(differences) == 1, out
        assert differences[0].strip().startswith(f"source.{label}: ")
        path.write_text(text)
    path = source / "olive" / "passes" / "adapters" / "merge.py"
    path.write_text(path.read_text() + "\n# changed\n")
    out = explained(trained, source)
    assert "lora: hit" in out
    assert "merge: miss" in out


def test_another_library_version_is_a_miss_and_is_named(trained: Path, tmp_path: Path) -> None:
    info = tmp_path / "peft-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99.0\n")
    out = explained(trained, tmp_path)
    assert "lora: miss" in out
    (line,) = [line for line in out.splitlines() if " -> " in line]
    assert line.strip().startswith("libraries.peft: ")
    assert line.endswith('-> "99.0"')


@pytest.mark.parametrize(
    ("name", "label"), [("rows.json", "data.train.content"), ("base/model.safetensors", "model.digest")]
)
def test_a_file_rewritten_under_the_same_size_and_time_is_a_miss(
    trained: Path, name: str, label: str
) -> None:
    path = trained / name
    content, times = path.read_bytes(), path.stat()
    assert "lora: hit" in explained(trained)
    memo = json.loads((trained / ".olive-cache" / "digests.json").read_text())["files"]
    assert any(f":{times.st_ino}:{times.st_size}:{times.st_mtime_ns}:" in known for known in memo)
    # the last digit of the rows' numbers, or the last bit of the last weight
    changed = (
        content.replace(b"number 07", b"number 70")
        if name == "rows.json"
        else content[:-1] + bytes([content[-1] ^ 1])
    )
    assert (len(changed), changed == content) == (len(content), False)
    try:
        path.write_bytes(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
        out = explained(trained)
        assert "lora: miss" in out
        (line,) = [line for line in out.splitlines() if " -> " in line]
        assert line.strip().startswith(f"{label}: ")
    finally:
        path.write_bytes(content)
    assert "lora: hit" in explained(trained)


def hiding(folder: Path, tmp_path: Path, names: tuple[str, ...], *arguments: str) -> Done:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    return ended(cold(*arguments, cwd=folder, path=[tmp_path], HIDDEN=",".join(names)))


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_missing_extra_is_named(trained: Path, tmp_path: Path, verb: str) -> None:
    folder = copy(trained, tmp_path / "work")
    write(folder, document(steps=2))
    done = hiding(folder, tmp_path, EXTRA, verb, "doc.json")
    assert done.code == 5, done.said
    said = plain(done.said)
    assert "LoRA needs torch, transformers, peft, accelerate, not installed" in said
    assert "MergeAdapterWeights needs torch, not installed" in said
    assert "ModelBuilder needs onnxruntime-genai, onnxruntime, onnx, onnx-ir, torch, transformers" in said
    assert said.count("onnx-ir") == 1
    assert "pip install 'olive-next[cpu]'" in said
    assert "Traceback" not in done.err


def test_one_missing_library_is_named(trained: Path, tmp_path: Path) -> None:
    done = hiding(trained, tmp_path, ("peft",), "run", "doc.json")
    assert done.code == 5, done.said
    assert "LoRA needs peft, not installed" in done.err
    assert "at  passes.lora" in done.err
    assert "pip install 'olive-next[cpu]'" in done.err


def test_rows_that_only_a_missing_library_reads(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path / "work")
    body = document(passes=["lora"])
    body["data_configs"][0]["load_dataset_config"] = {"data_name": "someone/rows", "split": "train"}
    write(folder, body)
    done = hiding(folder, tmp_path, ("datasets",), "plan", "doc.json")
    assert done.code == 5, done.said
    assert "needs datasets, not installed" in plain(done.out)


def test_a_graphics_card_that_is_not_there(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path / "work")
    accelerators = [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]
    body = document(passes=["lora"]) | {"host": "gpu", "target": "gpu"}
    body["systems"] = {"gpu": {"type": "LocalSystem", "accelerators": accelerators}}
    write(folder, body)
    done = ended(cold("run", "doc.json", cwd=folder, CUDA_VISIBLE_DEVICES=""))
    assert done.code == 5, done.said
    assert "systems.gpu" in done.err


def test_a_hub_model_is_fetched_on_request_only(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from olive.cli.main import entry
    from olive.resources import resolve

    commit = "0" * 40
    hub = tmp_path / "hub" / "models--owner--small" / "snapshots" / commit
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "rows.json", tmp_path)
    body = document(steps=2, passes=["lora"])
    body["input_model"]["model_path"] = "owner/small"
    write(tmp_path, body)
    for verb in ("plan", "run"):
        assert entry([verb, "doc.json"]) == 5
        said = plain("".join(capsys.readouterr()))
        assert "'owner/small' is not on this machine" in said
        assert "`olive run --download FILE`" in said
        assert "`hf download owner/small`" in said
        assert "Traceback" not in said

    def download(name: str, revision: str | None, looked: list[Path]) -> Path:
        shutil.copytree(trained / "base", hub)
        (hub.parents[1] / "refs").mkdir()
        (hub.parents[1] / "refs" / "main").write_text(commit)
        return hub

    monkeypatch.setattr(resolve, "_download", download)
    monkeypatch.setattr("olive.workflows.carry_out", lambda planned: pytest.fail(str(planned.model.path)))
    with pytest.raises(pytest.fail.Exception, match=commit):
        entry(["run", "doc.json", "--download"])
    assert entry(["plan", "doc.json"]) == 0


def test_an_edited_delivery_is_refused_before_the_work(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained, tmp_path / "work", output=True)
    shutil.rmtree(folder / ".olive-cache")
    (folder / "olive-output" / "model" / "notes.txt").write_text("mine")
    done = ended(cold("run", "doc.json", cwd=folder))
    assert done.code == 2, done.said
    assert "notes.txt" in done.err
    assert (folder / "olive-output" / "model" / "notes.txt").read_text() == "mine"


def test_a_damaged_result_is_told_whoever_finds_it(trained: Path, tmp_path: Path) -> None:
    """A plan sees a wrong size, a run a wrong byte; both say so and the result is made again."""
    for number, damage in enumerate((lambda data: data[:-1], lambda data: data[:-1] + b"!")):
        folder = copy(trained, tmp_path / f"work{number}")
        (weights,) = folder.glob(".olive-cache/entries/*/files/adapter_model.safetensors")
        weights.write_bytes(damage(weights.read_bytes()))
        done = run("run", "doc.json", cwd=folder)
        assert done.code == 0, done.said
        assert "is damaged" in done.err
        found = json.loads((folder / "olive-output" / "run.json").read_text())
        assert [step["cached"] for step in found["steps"]] == [False, True]
        assert any("is damaged" in finding["message"] for finding in found["findings"])


def misspelt(body: dict[str, Any]) -> str:
    body["passes"]["lora"]["training_args"]["learning_rte"] = 1e-4
    return json.dumps(body)


def wrong_type(body: dict[str, Any]) -> str:
    body["passes"]["lora"]["r"] = "many"
    return json.dumps(body)


def no_number(body: dict[str, Any]) -> str:
    body["passes"]["lora"]["alpha"] = float("nan")
    return json.dumps(body)


def too_large(body: dict[str, Any]) -> str:
    body["data_configs"][0]["pre_process_data_config"]["max_seq_len"] = 10**12
    return json.dumps(body)


def deep(body: dict[str, Any]) -> str:
    return '{"passes": ' + "[" * 100_000 + "]" * 100_000 + "}"


def twice(body: dict[str, Any]) -> str:
    return json.dumps(body)[:-1] + ', "input_model": {"model_path": "other"}}'


REFUSED: list[tuple[Callable[[dict[str, Any]], str], str]] = [
    (misspelt, "learning_rate"),
    (wrong_type, "passes.lora.r"),
    (no_number, "doc.json"),
    (too_large, "max_seq_len"),
    (deep, "doc.json"),
    (twice, "input_model"),
]


@pytest.mark.parametrize(("spell", "says"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_wrong_document_is_refused_at_once(
    tmp_path: Path, spell: Callable[[dict[str, Any]], str], says: str
) -> None:
    (tmp_path / "doc.json").write_text(spell(document()))
    code = (
        "import sys; from olive.cli.main import entry; code = entry(['run', 'doc.json']);"
        "print([name for name in sys.argv[1:] if name in sys.modules]); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "torch", "transformers", "onnx", "onnxruntime", "datasets", "numpy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    assert done.stdout.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert not (tmp_path / ".olive-cache").exists()
