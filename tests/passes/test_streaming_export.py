"""The export that streams weights writes what the builder writes: the same graph, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from adapter_kit import context
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe
from olive.passes.export.model_builder import ModelBuilder, builder_options, tied

FAMILIES = ("llama", "phi3", "qwen2", "qwen3", "mistral", "smollm3")


def model(folder: Path, family: str, **overrides: Any) -> Path:
    """A tiny model of a family; biases, where it has any, are not zero."""
    import transformers

    names = {"llama": "Llama", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
    name = names.get(family, "SmolLM3")
    config, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    settings = {"layers": 2, "hidden": 128, "seed": 0, "overrides": overrides}
    tiny._write(config, kind, folder, **settings)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for key in tensors:
        if key.endswith(".bias"):
            tensors[key] = torch.randn(tensors[key].shape, generator=generator) * 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ours(source: Path, folder: Path, params: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    ctx = context(folder)
    wanted = ModelBuilder.Params.model_validate(params)
    ModelBuilder().run(Artifact(kind=Kind.HF, path=source, digest="0" * 64), wanted, ctx)
    return ctx.out, ctx.facts


def theirs(source: Path, out: Path, params: dict[str, Any], provider: str = "cpu") -> Path:
    """The builder's own export, nothing replaced."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    wanted = ModelBuilder.Params.model_validate(params)
    options = builder_options(wanted, tied(describe(source)))
    place = (None, str(source), str(out), wanted.precision, provider, str(out / "cache"))
    create_model(*place, **parse_extra_options(*place, [f"{key}={text}" for key, text in options.items()]))
    return out


def nodes(graph: onnx.GraphProto) -> dict[str, bytes]:
    return {node.name: node.SerializeToString(deterministic=True) for node in graph.node}


def values(graph: onnx.GraphProto) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    return {value.name: (value.data_type, tuple(value.dims), value.raw_data) for value in graph.initializer}


def assert_same(found: Path, wanted: Path) -> None:
    """Nodes, constants and known shapes are identical; only the places in the file of weights may differ."""
    one, other = onnx.load(found / "model.onnx"), onnx.load(wanted / "model.onnx")
    assert nodes(one.graph) == nodes(other.graph)
    ours, theirs = values(one.graph), values(other.graph)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    shapes = [
        {value.name: value.SerializeToString(deterministic=True) for value in graph.value_info}
        for graph in (one.graph, other.graph)
    ]
    assert shapes[0] == shapes[1]
    assert one.opset_import == other.opset_import
    assert one.ir_version == other.ir_version
    assert (found / "genai_config.json").is_file()


STREAMED = {"weights": "mapped", "quantiser": "streamed"}
INT4: dict[str, Any] = {"precision": "int4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported_as_the_builder_does(family: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source", family, tie_word_embeddings=family in ("phi3", "qwen3"))
    found, facts = ours(source, tmp_path / "run", INT4)
    assert STREAMED.items() <= facts.items()
    assert_same(found, theirs(source, tmp_path / "theirs", INT4))


@pytest.mark.parametrize(
    ("family", "tie", "params"),
    [
        ("llama", False, {"is_symmetric": False}),
        ("llama", False, {"precision": "int8"}),
        ("llama", False, {"precision": "int8", "is_symmetric": False, "block_size": 16}),
        ("llama", False, {"algo_config": "rtn"}),
        ("llama", False, {"algo_config": "rtn", "is_symmetric": False, "block_size": 64}),
        ("llama", False, {"algo_config": "rtn_last", "precision": "int4"}),
        ("llama", False, {"algo_config": "rtn", "precision": "int8"}),
        ("llama", False, {"op_types_to_quantize": ["MatMul", "Gather"]}),
        ("llama", False, {"op_types_to_quantize": ["MatMul", "Gather"], "is_symmetric": False}),
        ("llama", False, {"nodes_to_exclude": ["/lm_head/MatMul", "/model/layers.0/mlp/down_proj/MatMul"]}),
        ("llama", False, {"matmul_mixed_precision": {"last_matmul": "int8", "mixed_layers": "int8"}}),
        ("llama", False, {"accuracy_level": 0, "block_size": 128}),
        ("llama", False, {"extra_options": {"shared_embeddings": False}}),
        ("phi3", True, {"is_symmetric": False}),
        ("phi3", True, {"algo_config": "rtn"}),
        ("phi3", True, {"nodes_to_exclude": ["/lm_head/MatMul"]}),
        ("phi3", True, {"precision": "int8"}),
        ("phi3", True, {"precision": "fp32"}),
        ("qwen2", False, {"precision": "fp32"}),
        ("qwen2", True, {"algo_config": "rtn", "is_symmetric": False}),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_to_the_builder(
    family: str, tie: bool, params: dict[str, Any], tmp_path: Path
) -> None:
    source = model(tmp_path / "source", family, tie_word_embeddings=tie)
    params = INT4 | params
    found, facts = ours(source, tmp_path / "run", params)
    assert facts["weights"] == "mapped"
    assert facts["quantiser"] == (None if params["precision"] == "fp32" else "streamed")
    assert_same(found, theirs(source, tmp_path / "theirs", params))
