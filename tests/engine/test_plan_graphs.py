"""Documents that start from an ONNX graph: what the plan says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import graph_kit
from olive.engine.plan import Plan, plan
from olive.errors import Severity
from olive.models.artifact import Kind
from olive.report.console import plan_view
from olive.workflows import load


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph_kit.mlp(tmp_path_factory.mktemp("net") / "model")


def planned(model: Path | str, folder: Path, kind: str, **params: Any) -> Plan:
    document = {
        "input_model": {"type": "OnnxModel", "model_path": str(model)},
        "passes": {"q": {"type": kind, **params}},
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "out"),
    }
    return plan(load(document))


def errors(found: Plan) -> list[str]:
    return [str(problem) for problem in found.findings if problem.severity is Severity.ERROR]


def test_the_graph_is_told_without_onnx(net: Path, tmp_path: Path) -> None:
    found = planned(net, tmp_path, "OnnxKQuantQuantization")
    assert errors(found) == []
    assert found.model is not None
    assert found.model.kind is Kind.ONNX
    assert found.info is not None
    assert found.info.graph is not None
    assert f"{len(found.info.graph.nodes)} nodes, opset" in plan_view(found)
    assert found.steps[0].key


def test_one_file_of_many_is_the_model(net: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for path in net.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "other.onnx").write_bytes(next(net.glob("*.onnx")).read_bytes())
    (said,) = errors(planned(folder, tmp_path, "OnnxKQuantQuantization"))
    assert "which one is meant" in said
    one = next(path for path in folder.glob("*.onnx") if path.name != "other.onnx")
    first = planned(one, tmp_path, "OnnxKQuantQuantization")
    assert errors(first) == []
    (folder / "other.onnx").write_bytes(b"changed")
    assert planned(one, tmp_path, "OnnxKQuantQuantization").steps[0].key == first.steps[0].key


def test_what_cannot_be(net: Path, tmp_path: Path) -> None:
    (said,) = errors(planned(tmp_path / "nett.onnx", tmp_path, "OnnxKQuantQuantization"))
    assert "nett.onnx" in said
    (said,) = errors(planned("nett.onnx", tmp_path, "OnnxKQuantQuantization"))
    assert "there is no file nett.onnx" in said
    (said,) = errors(planned(net, tmp_path, "Rtn"))
    assert "Put it before the export, or start from the HfModel" in said
    (tmp_path / "torn.onnx").write_bytes(next(net.glob("*.onnx")).read_bytes()[:200])
    (said,) = errors(planned(tmp_path / "torn.onnx", tmp_path, "OnnxKQuantQuantization"))
    assert "is no ONNX model" in said
