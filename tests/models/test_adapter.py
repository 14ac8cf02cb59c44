"""Adapters: taken whole, on the base they fit, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny
from olive.errors import ConfigError, PassFailed, UntrustedInput
from olive.models.adapter import load_adapter
from olive.models.artifact import Kind
from olive.models.hf import describe, load_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "qkv_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base, dtype="float32"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "adapter")


def rename_tensors(folder: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = {name.replace(old, new): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_load_adapter_adds_scaled_b_times_a(base: Path, adapter: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = load_adapter(base, adapter, "float32")
    assert not model.training
    tensors = load_file(adapter / "adapter_model.safetensors")
    plain = load_model(base, dtype="float32")
    prefix = "base_model.model.model.layers.1.self_attn.o_proj"
    delta = 2.0 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]  # alpha / r = 2
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    linear = plain.model.layers[1].self_attn.o_proj
    with torch.inference_mode():
        got = model.base_model.model.model.layers[1].self_attn.o_proj(x)
        torch.testing.assert_close(got, x @ (linear.weight + delta).T, rtol=0, atol=1e-5)


def test_describe_an_adapter(adapter: Path) -> None:
    info = describe(adapter)
    assert info.kind is Kind.ADAPTER
    assert info.config["r"] == 4
    assert len(info.tensors) == 2 * 2 * 2


def test_dtype(base: Path, adapter: Path) -> None:
    import torch

    assert {p.dtype for p in load_adapter(base, adapter, "bfloat16").parameters()} == {torch.bfloat16}


def test_a_foreign_prefix_is_refused(base: Path, adapter: Path) -> None:
    rename_tensors(adapter, "base_model.model.model.", "base_model.model.transformer.")
    with pytest.raises(PassFailed, match="no module of the base takes"):
        load_adapter(base, adapter, "float32")


def test_a_base_with_more_layers_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="missing that the base has a place for"):
        load_adapter(tiny.tiny_phi3(tmp_path / "other", layers=3), adapter, "float32")


def test_a_base_of_another_width_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="does not fit the base"):
        load_adapter(tiny.tiny_phi3(tmp_path / "other", hidden=32), adapter, "float32")


def test_a_base_without_the_modules_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PassFailed):
        load_adapter(tiny.tiny_llama(tmp_path / "llama"), adapter, "float32")


def test_a_pickled_adapter_is_refused(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UntrustedInput, match="pickle"):
        load_adapter(base, adapter, "float32")


def test_a_model_is_no_adapter(base: Path) -> None:
    with pytest.raises(ConfigError, match="is no adapter"):
        load_adapter(base, base, "float32")
