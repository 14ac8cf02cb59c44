"""Merging equals PEFT's own merge, for every kind of LoRA it takes; the rest is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import artifact, context, make_adapter
from foreign_kit import foreign
from olive.config.gates import MergeGate
from olive.config.workflow import Accelerator
from olive.engine.gates import merge as gate
from olive.errors import ConfigError, InternalError, PassFailed, Problem
from olive.hardware.probe import probe
from olive.models import stream
from olive.models.hf import describe, load_model
from olive.passes.adapters.merge import MergeAdapterWeights

LLAMA = ["q_proj", "v_proj", "down_proj"]


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base, dtype="float32"), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def merge(base: Path, adapter: Path, folder: Path, **params: Any) -> Path:
    ctx = context(folder)
    MergeAdapterWeights().run(artifact(base, adapter), MergeAdapterWeights.Params.model_validate(params), ctx)
    MergeAdapterWeights().ensure(ctx.out)
    return ctx.out


@pytest.mark.parametrize(
    ("family", "model", "lora"),
    [
        ("phi3", {}, {}),
        ("phi3", {"tie_word_embeddings": False}, {"target_modules": "all-linear"}),
        ("llama", {}, {"target_modules": LLAMA, "use_rslora": True}),
        ("llama", {}, {"target_modules": LLAMA, "alpha_pattern": {"v_proj": 32}}),
        ("llama", {}, {"target_modules": LLAMA, "rank_pattern": {"layers.1.self_attn.q_proj": 8}}),
        ("llama", {"tie_word_embeddings": False}, {"target_modules": LLAMA, "modules_to_save": ["lm_head"]}),
    ],
)
def test_equals_peft(tmp_path: Path, family: str, model: dict[str, Any], lora: dict[str, Any]) -> None:
    import torch

    make = tiny.tiny_phi3 if family == "phi3" else tiny.tiny_llama
    base = make(tmp_path / "base", **model)
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    out = merge(base, adapter, tmp_path / "run")
    found = load_model(out, dtype="float32").state_dict()
    wanted = merged_by_peft(base, adapter)
    plain = load_model(base, dtype="float32").state_dict()
    assert set(found) == set(wanted)
    changed = 0
    check_gate(base, adapter, out)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
        changed += not torch.equal(plain[name], value)
    assert changed
    assert json.loads((out / "tokenizer.json").read_text()) == json.loads(
        (base / "tokenizer.json").read_text()
    )


def test_a_half_precision_base_is_rounded_once(tmp_path: Path) -> None:
    import torch

    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / "run", dtype="bfloat16")
    found, wanted = load_model(out, dtype="bfloat16").state_dict(), merged_by_peft(base, adapter)
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name


def test_the_dtype_is_the_wider_of_the_bases_and_that_of_training(tmp_path: Path) -> None:
    half = tmp_path / "half"
    base = tiny.tiny_phi3(tmp_path / "base")
    load_model(base, dtype="bfloat16").save_pretrained(half)
    adapter = make_adapter(base, tmp_path / "adapter")
    for name, stored, attributes, code in (
        ("a", half, {}, "BF16"),
        ("b", half, {"dtype": "float32"}, "F32"),
        ("c", base, {"dtype": "bfloat16"}, "F32"),
    ):
        ctx = context(tmp_path / name)
        MergeAdapterWeights().run(artifact(stored, adapter, **attributes), MergeAdapterWeights.Params(), ctx)
        info = describe(ctx.out)
        assert {dtype for dtype, _ in info.tensors.values()} == {code}
        spelt = {"BF16": "bfloat16", "F32": "float32"}[code]
        assert (info.config["dtype"], info.config["torch_dtype"]) == (spelt, spelt)


def check_gate(base: Path, adapter: Path, merged: Path) -> None:
    """Base and adapter, as PEFT runs them unmerged, say what the merged model says."""
    ctx = context(merged.parent / "gate")
    result = gate.check(artifact(base, adapter), merged, MergeGate(), ctx, [[5, 9, 40, 77, 200, 31]])
    assert result.figures["kl"] < 1e-6


# Of a model whose head is its embedding PEFT's own merge changes both; unmerged, it changes what was trained.
@pytest.mark.parametrize(
    ("lora", "apart"),
    [
        ({"target_modules": ["o_proj", "embed_tokens"]}, True),
        ({"target_modules": ["o_proj", "lm_head"]}, True),
        ({"target_modules": ["o_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_that_is_the_embedding(tmp_path: Path, lora: dict[str, Any], apart: bool) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    out = merge(base, adapter, tmp_path / "run")
    info = describe(out)
    assert ("lm_head.weight" in info.tensors) is apart
    assert info.config["tie_word_embeddings"] is not apart
    check_gate(base, adapter, out)


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base", rope_parameters={"rope_theta": 12345.0, "rope_type": "default"})
    (base / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": 0.5}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    ctx = context(tmp_path / "run")
    adapter = make_adapter(base, tmp_path / "adapter")
    MergeAdapterWeights().run(artifact(base, adapter, dtype="float32"), MergeAdapterWeights.Params(), ctx)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (ctx.out / name).read_bytes() == (base / name).read_bytes()
    assert not list(ctx.out.glob("adapter*"))
    assert json.loads((ctx.out / "config.json").read_text())["rope_theta"] == 12345.0
    assert ctx.attributes == {"dtype": "float32"}
    assert ctx.facts == {"merged_tensors": 4, "replaced_tensors": 0, "dtype": "float32"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sharded_base(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    sharded = tmp_path / "sharded"
    load_model(base, dtype="float32").save_pretrained(sharded, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((base / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj", "lm_head"])
    out = merge(sharded, adapter, tmp_path / "run")
    assert {p.name for p in sharded.glob("*.safetensors")} == {p.name for p in out.glob("*.safetensors")}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == describe(out).tensors.keys() > {"lm_head.weight"}
    check_gate(sharded, adapter, out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "has only"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    ],
)
def test_what_is_more_than_scaled_b_a_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PassFailed, match=says) as caught:
        merge(base, adapter, tmp_path / "run")
    assert caught.value.problems[0].fix
    (problem,) = problems(base, adapter)
    assert says in problem.message
    assert (problem.where, problem.exit_code) == ("MergeAdapterWeights", 2)


def problems(base: Path, adapter: Path | None = None) -> list[Problem]:
    """What the plan finds."""
    info = describe(base).model_copy(update={"adapter": adapter})
    return list(MergeAdapterWeights().check(info, MergeAdapterWeights.Params(), probe(), Accelerator()))


def rewrite(adapter: Path, change: Any) -> None:
    """Change the tensors of an adapter: name -> tensor in, the same out."""
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file(change({k: v.clone() for k, v in load_file(path).items()}), path, metadata={"format": "pt"})


def half_a_pair(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if not k.endswith("layers.0.self_attn.o_proj.lora_B.weight")}


def two_ranks(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v[:, :3].clone() if k.endswith("o_proj.lora_B.weight") else v for k, v in tensors.items()}


def foreign_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k.replace("base_model.model.", "transformer."): v for k, v in tensors.items()}


def other_modules(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k.replace("qkv_proj", "query"): v for k, v in tensors.items()}


def wider(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in tensors.items()}


def table_of_another_size(tensors: dict[str, Any]) -> dict[str, Any]:
    import torch

    return tensors | {"base_model.model.model.embed_tokens.weight": torch.zeros(400, 64)}


def convolution(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v[..., None, None].clone() if "lora_" in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (half_a_pair, "has only"),
        (two_ranks, "rank 4 and .* rank 3"),
        (foreign_prefix, "8 tensors of the adapter have no place"),
        (other_modules, "2 tensors of the adapter have no place.*query"),
        (wider, r"has shape \(64, 64\).* trained on \(64, 128\)"),
        (table_of_another_size, r"brings \(400, 64\)"),
        (convolution, "two axes"),
        (lambda tensors: {}, "holds no tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_adapter_that_does_not_fit_is_refused_before_and_in_the_run(
    tmp_path: Path, change: Any, says: str
) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    assert problems(base, adapter) == []
    rewrite(adapter, change)
    with pytest.raises(PassFailed, match=says) as caught:
        merge(base, adapter, tmp_path / "run")
    assert caught.value.problems[0].fix
    (problem,) = problems(base, adapter)
    assert re.search(says, problem.message)
    assert problem.fix
    assert (problem.where, problem.exit_code) == ("MergeAdapterWeights", 2)


def test_a_truncated_adapter_is_untrusted(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = problems(base, adapter)
    assert problem.exit_code == 6
    path.unlink()
    (problem,) = problems(base, adapter)
    assert "no readable adapter_model.safetensors" in problem.message


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quark"):
        problems(base)
    config["quantization_config"] = {"quant_method": "olive", "bits": 4, "group_size": 32, "symmetric": False}
    (base / "config.json").write_text(json.dumps(config))
    (problem,) = problems(base)
    assert "olive" in problem.message
    foreign(tiny.tiny_phi3(tmp_path / "plain"), tmp_path / "given", "gptq")
    (problem,) = problems(tmp_path / "given")
    assert "gptq" in problem.message


def test_an_adapter_without_base_is_refused(tmp_path: Path) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    alone = artifact(base, base).model_copy(update={"base": None})
    with pytest.raises(PassFailed, match="names no base model"):
        MergeAdapterWeights().run(alone, MergeAdapterWeights.Params(), context(tmp_path / "run"))


def test_a_stream_keeps_its_promise(tmp_path: Path) -> None:
    import torch

    layout: dict[str, stream.Layout] = {"a": ("F32", (2, 3)), "b": ("BOOL", ()), "c": ("BF16", (0, 4))}
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(True), "c": torch.empty(0, 4, dtype=torch.bfloat16)}
    assert stream.write(tmp_path / "model.safetensors", layout, tensors.__getitem__) == 25
    with stream.LazyTensors(tmp_path) as written:
        assert written.layout == layout
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(InternalError, match="float64"):
        stream.write(tmp_path / "x.safetensors", layout, lambda name: torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(PassFailed, match="F8_E4M3"):
        stream.write(tmp_path / "x.safetensors", {"a": ("F8_E4M3", (2,))}, tensors.__getitem__)
