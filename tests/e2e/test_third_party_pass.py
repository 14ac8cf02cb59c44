"""A pass of somebody else that misbehaves: exit 3, told to its developer, nothing stored."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fault_kit import Fault, model, result, run, store, write

from tiny import tiny_phi3

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")
PLUGIN = '''
"""A pass that goes wrong in the way it is asked to."""

import json
import os
import shutil
import sys
from collections.abc import Iterable

from pydantic import Field

from olive.config.base import PassParams
from olive.models.artifact import Kind
from olive.passes.base import Pass


class Acme(Pass["Acme.Params"]):
    """Copies the model, or not."""

    class Params(PassParams):
        """What goes wrong."""

        how: str = Field("nothing", description="What goes wrong.")

    accepts, produces = (Kind.HF,), Kind.HF
    libraries = ("filelock", "pluggy")

    def check(self, model, params, machine, accelerator):
        if params.how == "check":
            raise KeyError("head_dim")
        return ()

    def estimate(self, model, params, machine, *more):
        if params.how == "estimate":
            raise ZeroDivisionError("no layers")
        return super().estimate(model, params, machine, *more)

    def run(self, model, params, ctx):
        with open(ctx.base_dir / "tries", "a") as file:
            file.write(params.how + "\\n")
        shutil.copytree(model.path, ctx.out, dirs_exist_ok=True)
        if params.how == "nan_fact":
            ctx.facts["error"] = float("nan")
        elif params.how == "odd_series":
            ctx.series["loss"] = [0.5, 0.25]
        else:
            getattr(self, "_" + params.how)(ctx.out)

    def _nothing(self, out):
        """As it should be."""

    def _no_files(self, out):
        shutil.rmtree(out)
        out.mkdir()

    def _no_weights(self, out):
        (out / "model.safetensors").unlink()

    def _nan(self, out):
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(out / "model.safetensors")
        tensors["model.norm.weight"][3] = torch.nan
        save_file(tensors, out / "model.safetensors")

    def _broken_json(self, out):
        (out / "config.json").write_text("{")

    def _cut_weights(self, out):
        os.truncate(out / "model.safetensors", 5000)

    def _link(self, out):
        (out / "notes.txt").symlink_to("/etc/hostname")

    def _raises(self, out):
        raise IndexError("layer 7 of 2")

    def _leaves(self, out):
        sys.exit(0)
'''
CASES = [
    ("no_files", "wrote no config.json", "Pass developer: write the whole artifact into ctx.out"),
    ("no_weights", "wrote no *.safetensors", "Pass developer: write the whole artifact into ctx.out"),
    ("nan", "NaN or infinity in model.norm.weight", "Lower the learning rate"),
    ("broken_json", "wrote config.json that is no JSON", "Pass developer: write files that load"),
    ("cut_weights", "wrote model.safetensors that does not load", "Pass developer: write files that load"),
    ("link", "holds notes.txt, which is no regular file", "Pass developer: copy the file"),
    ("raises", "IndexError: layer 7 of 2", "--debug"),
    ("nan_fact", "no JSON", "Pass developer: put finite numbers"),
    ("odd_series", "no JSON", "Pass developer: put finite numbers"),
    ("leaves", "ended the program (exit 0)", "Pass developer: raise an exception"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace, and the plug-in installed beside it."""
    folder = tmp_path_factory.mktemp("bench")
    tiny_phi3(folder / "base")
    info = folder / "site" / "acme_passes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-passes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[olive.passes]\nAcmeCopy = acme_passes:Acme\n")
    (folder / "site" / "acme_passes.py").write_text(PLUGIN)
    return folder


def document(how: str) -> dict[str, Any]:
    return {
        "input_model": {"type": "HfModel", "model_path": "base"},
        "passes": {"copy": {"type": "AcmeCopy", "how": how}},
        "output_dir": f"out-{how}",
    }


def plain(text: str) -> str:
    """Without the line breaks of an 80-column terminal."""
    return " ".join(text.split())


def test_a_pass_under_another_name_than_its_class(bench: Path) -> None:
    body = document("nothing") | {"output_dir": "olive-output"}
    write(bench, body)
    site = Fault(path=(str(bench / "site"),))
    done = run("run", "doc.json", cwd=bench, fault=site)
    assert done.code == 0, done.said
    assert "model.safetensors" in model(bench)
    (step,) = result(bench)["steps"]
    assert (step["type"], step["cached"]) == ("AcmeCopy", False)
    (key,) = store(bench, "entries")
    inputs = json.loads((bench / ".olive-cache" / "entries" / key / "manifest.json").read_text())["body"][
        "inputs"
    ]
    assert all(inputs["libraries"].values()), "libraries that this product does not know have versions too"

    (bench / "site" / "acme_passes.py").write_text(PLUGIN + "\n# better\n")
    done = run("cache", "explain", "--config", "doc.json", cwd=bench, fault=site)
    assert done.code == 0, done.said
    assert "copy: miss" in done.out
    assert "source.pass: " in done.out


@pytest.mark.parametrize(("how", "says", "fix"), CASES, ids=[case[0] for case in CASES])
def test_what_goes_wrong_is_not_stored(bench: Path, how: str, says: str, fix: str) -> None:
    write(bench, document(how), f"{how}.json")
    before = store(bench, "entries")
    for tries in (1, 2):
        done = run("run", f"{how}.json", cwd=bench, fault=Fault(path=(str(bench / "site"),)))
        assert done.code == 3, done.said
        assert says in plain(done.err)
        assert fix in plain(done.err)
        assert "step copy (AcmeCopy)" in done.err
        assert "Traceback" not in done.err
        assert (bench / "tries").read_text().split().count(how) == tries
    assert store(bench, "entries") == before
    assert store(bench, "staging") == []
    assert not (bench / f"out-{how}").exists()


@pytest.mark.parametrize(("how", "says"), [("check", "KeyError: 'head_dim'"), ("estimate", "no layers")])
def test_a_plan_that_breaks_is_told_to_the_developer(bench: Path, how: str, says: str) -> None:
    write(bench, document(how), f"{how}.json")
    done = run("plan", f"{how}.json", cwd=bench, fault=Fault(path=(str(bench / "site"),)))
    assert done.code == 3, done.said
    assert says in plain(done.said)
    assert f"AcmeCopy.{how} raised" in plain(done.said)
    assert "Pass developer" in done.said
    assert how not in (bench / "tries").read_text().split()
