"""What the plan refuses of a pass: versions, the target's provider, an adapter that does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import make_adapter
from olive.config.workflow import Accelerator
from olive.engine.keys import step_parts
from olive.engine.plan import Plan, plan
from olive.errors import Problem, Severity
from olive.hardware.probe import probe
from olive.models.artifact import Artifact, Kind
from olive.workflows import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(tmp_path_factory.mktemp("base"))


def planned(base: Path, folder: Path, passes: dict[str, Any], **changes: Any) -> Plan:
    document = {
        "input_model": {"type": "HfModel", "model_path": str(base)},
        "passes": passes,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    return plan(load(document | changes))


def errors(found: Plan) -> list[Problem]:
    return [problem for problem in found.findings if problem.severity is Severity.ERROR]


EXPORT = {"export": {"type": "ModelBuilder", "precision": "fp32"}}


@pytest.mark.parametrize(
    ("packages", "says"),
    [
        ({"onnxruntime": "1.30.1"}, "onnxruntime-genai .* needs onnxruntime >= 1.31"),
        ({"safetensors": "0.7.0"}, "transformers .* needs safetensors >= 0.8.0"),
        ({"tokenizers": "0.22.0"}, "transformers .* needs tokenizers"),
        ({"onnxruntime-genai": "0.17.0"}, "too old"),
    ],
)
def test_versions_that_cannot_work_together(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: dict[str, str], says: str
) -> None:
    machine = probe()
    assert errors(planned(base, tmp_path, EXPORT)) == []
    other = machine.model_copy(update={"packages": machine.packages | packages})
    monkeypatch.setattr("olive.engine.plan.probe", lambda: other)
    (problem,) = errors(planned(base, tmp_path, EXPORT))
    assert problem.exit_code == 5
    assert str(problem.fix).startswith("pip install --upgrade")
    assert re.search(says, problem.message)


def test_an_export_is_checked_for_the_target(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers = ("CPUExecutionProvider", "DmlExecutionProvider")
    machine = probe().model_copy(update={"execution_providers": providers})
    monkeypatch.setattr("olive.engine.plan.probe", lambda: machine)
    systems = {
        name: {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": [provider]}],
        }
        for name, provider in (("here", providers[0]), ("there", providers[1]))
    }
    same = planned(base, tmp_path, EXPORT, systems=systems, host="here", target="here")
    assert errors(same) == []
    found = planned(base, tmp_path, EXPORT, systems=systems, host="here", target="there")
    (problem,) = errors(found)
    assert problem.message == "precision fp32 does not run on DmlExecutionProvider"
    assert problem.where == "passes.export.ModelBuilder"


def test_an_export_for_another_provider_is_another_entry(base: Path, tmp_path: Path) -> None:
    found = planned(base, tmp_path, EXPORT)
    targets = (
        Accelerator.model_validate({"device": "cpu", "execution_providers": [name]})
        for name in ("CPUExecutionProvider", "WebGpuExecutionProvider")
    )
    one, other = (
        step_parts(
            found.workflow.passes["export"],
            Artifact(kind=Kind.HF, path=base, digest="0" * 64),
            found.workflow,
            accelerator=Accelerator(),
            target=target,
            machine=found.machine,
            base_dir=tmp_path,
            memo=tmp_path / "memo.json",
        )
        for target in targets
    )
    assert {name for name in one if one[name] != other[name]} == {"hardware"}


def test_an_adapter_of_the_document_is_held_against_its_base(base: Path, tmp_path: Path) -> None:
    merge = {"merge": {"type": "MergeAdapterWeights"}}
    adapter = make_adapter(base, tmp_path / "adapter")
    given = {"type": "HfModel", "model_path": str(base), "adapter_path": str(adapter)}
    assert errors(planned(base, tmp_path, merge, input_model=given)) == []
    other = tiny.tiny_phi3(tmp_path / "other", hidden=32)
    (problem,) = errors(planned(base, tmp_path, merge, input_model=given | {"model_path": str(other)}))
    assert "the adapter was trained on" in problem.message
    assert (problem.exit_code, problem.where) == (2, "passes.merge.MergeAdapterWeights")
