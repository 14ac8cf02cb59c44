"""The export that streams weights writes what the builder writes: the same graph, the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from adapter_kit import context
from olive.errors import PassFailed
from olive.models.artifact import Artifact, Kind
from olive.models.hf import describe
from olive.models.quantised import Layer, expand
from olive.models.stream import LazyTensors
from olive.passes.export import integers, tree
from olive.passes.export.model_builder import ModelBuilder, _build, builder_options, tied
from olive.passes.export.rounding import Rounding
from olive.passes.export.weights import Rows
from olive.passes.registry import resolve

NAMES = {
    "ernie": "Ernie4_5", "gemma": "Gemma", "granite": "Granite", "llama": "Llama", "mistral": "Mistral",
    "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3", "gemma2": "Gemma2",
}  # fmt: skip


def model(folder: Path, family: str, layers: int = 2, **overrides: Any) -> Path:
    """A tiny model of a family; biases, where it has any, are not zero."""
    name = NAMES[family]
    if family.startswith("gemma"):
        overrides = {"head_dim": 32} | overrides
    config, kind = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    tiny._write(config, kind, folder, layers, 128, 0, overrides)
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


INT4: dict[str, Any] = {"precision": "int4"}


@pytest.mark.parametrize("family", NAMES)
def test_a_family_is_exported_as_the_builder_does(family: str, tmp_path: Path) -> None:
    source = model(tmp_path / "source", family, tie_word_embeddings=family in ("phi3", "qwen3", "gemma"))
    found, facts = ours(source, tmp_path / "run", INT4)
    known = f"{NAMES[family]}ForCausalLM" in tree.ARCHITECTURES
    assert known is (family != "gemma2")
    assert facts["weights"] == ("mapped" if known else "transformers', for architecture Gemma2ForCausalLM")
    assert facts["quantiser"] == "streamed"
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


@pytest.mark.parametrize(
    ("provider", "params"),
    [
        ("cuda", {}),
        ("cuda", {"is_symmetric": False}),
        ("cuda", {"algo_config": "rtn", "is_symmetric": False}),
        ("cuda", {"extra_options": {"use_cuda_bf16": True}}),
        ("cuda", {"precision": "fp16"}),
    ],
    ids=str,
)
def test_half_precision_is_rounded_as_the_builder_rounds_it(
    provider: str, params: dict[str, Any], tmp_path: Path
) -> None:
    source = model(tmp_path / "source", "llama", tie_word_embeddings=False, dtype="bfloat16")
    wanted = ModelBuilder.Params.model_validate(INT4 | params)
    options = builder_options(wanted, tied(describe(source)))
    (tmp_path / "ours").mkdir()
    _build(source, tmp_path / "ours", wanted.precision, provider, options)
    assert_same(tmp_path / "ours", theirs(source, tmp_path / "theirs", INT4 | params, provider))


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_no_block_divides(bits: int, symmetric: bool, block: int) -> None:
    """onnxruntime fills the last block with codes of 0 and the last byte of zero points with 8."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    matrix = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=symmetric, bits=bits)
    weight, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        matrix.T.contiguous().numpy()
    )
    released: list[torch.Tensor] = []
    found = Rounding("default", bits, block, symmetric, torch.float32).matrix(
        Rows([matrix[:4], matrix[4:]]), released.append
    )
    assert np.array_equal(found.weight.numpy(), weight)
    assert np.array_equal(found.scales.numpy(), scales.reshape(found.scales.shape))
    assert found.zeros is None if symmetric else np.array_equal(found.zeros.numpy(), zeros)
    assert sum(part.numel() for part in released) >= matrix.numel()


@pytest.mark.parametrize("algorithm", ["k_quant", "k_quant_last", "k_quant_mixed"])
@pytest.mark.parametrize("tie", [True, False])
def test_k_quant_has_the_builders_graph_and_less_error(algorithm: str, tie: bool, tmp_path: Path) -> None:
    source = model(tmp_path / "source", "phi3", layers=4, tie_word_embeddings=tie)
    params = INT4 | {"algo_config": algorithm}
    found, facts = ours(source, tmp_path / "run", params)
    assert facts["quantiser"] == "streamed"
    wanted = theirs(source, tmp_path / "theirs", params)
    one, other = (onnx.load(folder / "model.onnx").graph for folder in (found, wanted))
    assert nodes(one) == nodes(other)
    mine, built = values(one), values(other)
    assert {name: value[:2] for name, value in mine.items()} == {
        name: value[:2] for name, value in built.items()
    }
    # the same inputs through onnxruntime: less of each layer's weights is lost than by the builder's search
    for node in one.node:
        if node.op_type != "MatMulNBits":
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        exact = original(source, node.name.removesuffix(f"_Q{sizes['bits']}"))
        errors = [float((expanded(graph, node, sizes) - exact).square().sum()) for graph in (mine, built)]
        assert errors[0] <= errors[1] * 1.01, node.name


def original(source: Path, node: str) -> torch.Tensor:
    """The matrix (outputs, inputs) behind a MatMul of the graph."""
    tensors = load_file(source / "model.safetensors")
    if node == "/lm_head/MatMul":
        return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    name = node.removeprefix("/").removesuffix("/MatMul").replace("/", ".").replace(".attn.", ".self_attn.")
    layer, _, last = name.rpartition(".")
    if last in ("gate_proj", "up_proj"):
        return tensors[f"{layer}.gate_up_proj.weight"].chunk(2)[last == "up_proj"]
    return tensors[f"{name}.weight"]


def expanded(graph: dict[str, Any], node: onnx.NodeProto, sizes: dict[str, int]) -> torch.Tensor:
    """What MatMulNBits multiplies by, float32 (outputs, inputs)."""
    weight, scales, zeros = (graph[name] for name in node.input[1:4])
    rows, columns, bits = sizes["N"], sizes["K"], sizes["bits"]
    blocks = weight[1][1]
    packed = [
        torch.frombuffer(bytearray(part[2]), dtype=torch.uint8).view(rows, -1) for part in (weight, zeros)
    ]
    stored = Layer(bits, sizes["block_size"], symmetric=False)
    step = torch.frombuffer(bytearray(scales[2]), dtype=torch.float32).view(rows, blocks)
    return expand(stored, packed[0], step, packed[1], columns)


@pytest.mark.parametrize(
    ("family", "params"),
    [
        ("phi3", {"lm_head": True, "overrides": {"lm_head": {"bits": 8}, "*.down_proj": {"bits": 8}}}),
        ("phi3", {"sym": True}),
        ("llama", {"lm_head": True}),
        ("llama", {"use_qdq": True}),
    ],
    ids=str,
)
def test_integers_are_written_from_the_files_that_hold_them(
    family: str, params: dict[str, Any], tmp_path: Path
) -> None:
    """The same bytes as the builder makes of a copy laid out for it, and no such copy."""
    plain = model(tmp_path / "plain", family, tie_word_embeddings=family == "phi3")
    technique = resolve("KQuant")
    ctx = context(tmp_path / "quantised")
    artifact = Artifact(kind=Kind.HF, path=plain, digest="0" * 64)
    export = INT4 | {"use_qdq": "use_qdq" in params}
    chosen = {name: value for name, value in params.items() if name != "use_qdq"}
    technique().run(artifact, technique.Params.model_validate(chosen), ctx)
    found, facts = ours(ctx.out, tmp_path / "run", export)
    assert facts["weights"] == "mapped integers"
    with integers.prepared(ctx.out, tmp_path / "copy") as (folder, read):
        laid_out = [path for path in folder.glob("*.safetensors") if path.stat().st_size == 0]
        assert laid_out
        for path in laid_out:
            save_file(read(str(path)), path)
        wanted = theirs(folder, tmp_path / "theirs", export)
    integers.finish_head(wanted, ctx.out)
    assert_same(found, wanted)


def test_what_the_builder_does_itself_is_said(tmp_path: Path) -> None:
    source = model(tmp_path / "source", "llama", tie_word_embeddings=False)
    params = INT4 | {"use_qdq": True}
    found, facts = ours(source, tmp_path / "run", params)
    assert facts["quantiser"] == "the builder's, for use_qdq"
    assert_same(found, theirs(source, tmp_path / "theirs", params))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    found, facts = ours(source, tmp_path / "again", INT4)
    assert facts["weights"] == "transformers', for weights stored as F32, to be loaded as torch.bfloat16"
    assert_same(found, theirs(source, tmp_path / "theirs again", INT4))


def test_a_checkpoint_that_says_something_else_is_left_to_transformers(tmp_path: Path) -> None:
    source = model(tmp_path / "source", "llama", tie_word_embeddings=False)
    config = transformers.AutoConfig.from_pretrained(source)
    assert tree.unfit(LazyTensors(source), config, 2) is None
    assert tree.unfit(LazyTensors(source), config, 1) == "a part of the layers"
    config.tie_word_embeddings = True
    assert "tied and stored" in str(tree.unfit(LazyTensors(source), config, 2))
    config.tie_word_embeddings = False
    config.intermediate_size = 64
    assert "of shape (128, 256), not (128, 64)" in str(tree.unfit(LazyTensors(source), config, 2))
    config.architectures = ["OlmoForCausalLM"]
    assert tree.unfit(LazyTensors(source), config, 2) == "architecture OlmoForCausalLM"


def test_a_builder_that_is_made_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that no longer asks the methods that are replaced would write a model of its own unnoticed."""
    from onnxruntime_genai.models import builder

    source = model(tmp_path / "source", "llama", tie_word_embeddings=False)
    save = builder.Model.save_model

    def plain(self: Any, folder: str) -> None:
        self.onnx_dtype = builder.ir.DataType.FLOAT
        save(self, folder)

    monkeypatch.setattr(builder.Model, "save_model", plain)
    with pytest.raises(PassFailed, match="does not load and quantise as the tested one"):
        ours(source, tmp_path / "run", INT4)


def test_everything_is_put_back(tmp_path: Path) -> None:
    import onnx_ir
    from onnxruntime_genai.models import builder

    before = dict(vars(builder.Model)), onnx_ir.save, builder.AutoTokenizer
    ours(model(tmp_path / "source", "llama", tie_word_embeddings=False), tmp_path / "run", INT4)
    assert (dict(vars(builder.Model)), onnx_ir.save, builder.AutoTokenizer) == before


_CHILD = """
import sys, json
from pathlib import Path
from olive.passes.export import model_builder as export
from olive.hardware.memory import peak_memory, reset_peak_memory
source, warm, out = map(Path, sys.argv[1:])
options = {"hf_token": "false", "algo_config": "rtn"}
for folder, target in ((warm, out / "warm"), (source, out / "ours")):
    target.mkdir(parents=True)
    reset_peak_memory()
    start = peak_memory()
    export._build(folder, target, "int4", "cpu", options)
print(peak_memory() - start)
print(sorted(name for name in sys.modules if name in ("torch._dynamo", "transformers.modeling_utils")))
config = json.loads((warm / "config.json").read_text())
(warm / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
print(export._build(warm, out / "warm", "int4", "cpu", options)["weights"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 250 MB; its largest matrix has 34 MB. The builder would hold 1 GB.

    Neither transformers' models nor torch's compiler are imported for it, but are when they are asked for.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": True}
    source = model(tmp_path / "source", "phi3", layers=4, **shape)
    warm = model(tmp_path / "warm", "phi3", layers=1, **shape)
    size = (source / "model.safetensors").stat().st_size
    line = [sys.executable, "-c", _CHILD, str(source), str(warm), str(tmp_path / "out")]
    said = subprocess.run(line, check=True, capture_output=True, text=True, env=os.environ).stdout
    grown, imported, fallback = said.splitlines()[-3:]
    assert size > 250e6
    assert int(grown) < 60e6
    assert imported == "[]"
    assert fallback.startswith("transformers', for weights stored as F32")
