"""Merging equals PEFT's own merge, for every kind of LoRA it takes; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import artifact, context, make_adapter
from olive.errors import PassFailed
from olive.models.hf import load_model
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


def test_a_sharded_base(tmp_path: Path) -> None:
    import torch

    base = tiny.tiny_phi3(tmp_path / "base")
    sharded = tmp_path / "sharded"
    load_model(base, dtype="float32").save_pretrained(sharded, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sharded / name).write_bytes((base / name).read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 1
    adapter = make_adapter(base, tmp_path / "adapter")
    out = merge(sharded, adapter, tmp_path / "run")
    wanted = merged_by_peft(base, adapter)
    for name, value in load_model(out, dtype="float32").state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
        ({"peft_type": "LOHA"}, "LOHA"),
    ],
)
def test_what_is_more_than_scaled_b_a_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    base = tiny.tiny_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PassFailed, match=says):
        merge(base, adapter, tmp_path / "run")
