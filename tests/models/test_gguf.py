"""GGUF files: read as the gguf package and transformers read them, and what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from olive.errors import ConfigError, UntrustedInput
from olive.models.foreign.gguf_folder import unfolded
from olive.models.foreign.gguf_header import read
from olive.models.hf import describe, load_model, open_model
from olive.models.quantised import DequantisedTensors
from olive.quantization import ggml
from tiny import TEXTS, tiny_llama

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return tiny_llama(
        folder, hidden=256, layers=1, initializer_range=0.2, tie_word_embeddings=False, num_key_value_heads=2
    )


def turned(value: Any, heads: int) -> Any:
    """Rows of q and k as llama.cpp's converter puts them."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def made(source: Path, path: Path, kind: str, **changes: Any) -> Path:
    """A file as llama.cpp's converter makes it, by the gguf package; matrices as ``kind``."""
    config = json.loads((source / "config.json").read_text())
    body = json.loads((source / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    vocab = sorted(body["model"]["vocab"], key=body["model"]["vocab"].get)
    special = {one["content"] for one in body["added_tokens"]}
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token in special else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in body["model"]["merges"]])
    writer.add_eos_token_id(vocab.index("<|end|>"))
    writer.add_add_bos_token(False)
    for name, tensor in load_file(source / "model.safetensors").items():
        value = tensor.numpy()
        base = name.removesuffix(".weight")
        inside = base.split(".", 3)[-1] if ".layers." in name else base
        place = f"blk.{base.split('.')[2]}.{NAMES[inside]}" if ".layers." in name else NAMES[inside]
        if inside in ("self_attn.q_proj", "self_attn.k_proj"):
            value = turned(value, config["num_attention_heads" if "q_" in inside else "num_key_value_heads"])
        if value.ndim == 2 and kind != "F32":
            raw = gguf.GGMLQuantizationType[kind]
            data = quantised(value, raw)
            writer.add_tensor(f"{place}.weight", data, raw_dtype=raw)
        else:
            writer.add_tensor(f"{place}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(value: Any, raw: gguf.GGMLQuantizationType) -> Any:
    """By the package, or random bytes with a small scale where it only knows how to expand."""
    try:
        return gguf.quantize(value, raw)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[raw]
        data = np.random.default_rng(0).integers(0, 256, (value.shape[0], value.shape[1] // block * size))
        data = data.astype(np.uint8).reshape(-1, size)
        scale = np.full(len(data), 0.001, np.float16).view(np.uint8).reshape(-1, 2)
        places = {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}[raw.name]
        for place in places:
            data[:, place : place + 2] = scale
        return data.reshape(value.shape[0], -1)


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"]
)
def test_weights_are_those_of_the_gguf_package(plain: Path, tmp_path: Path, kind: str) -> None:
    """Bit for bit where nothing or one product is rounded; its order of float32 sums elsewhere is ours too."""
    file = made(plain, tmp_path / "model.gguf", kind)
    folder = unfolded(file, tmp_path / "cache")
    info = describe(folder)
    integers = kind in ("Q4_0", "Q8_0", "Q6_K")
    assert any(name.endswith(".qweight") for name in info.tensors) is integers
    assert bool(info.notes) is (kind not in ("F32", "F16", "BF16"))
    config = json.loads((plain / "config.json").read_text())
    with DequantisedTensors(folder, json.loads((folder / "config.json").read_text())) as tensors:
        assert sorted(tensors.names()) == sorted(load_file(plain / "model.safetensors"))
        for one in gguf.GGUFReader(file).tensors:
            wanted = gguf.dequantize(one.data, one.tensor_type)
            ours = {v: k for k, v in NAMES.items()}
            part = one.name.removesuffix(".weight")
            inside = ours[part.split(".", 2)[-1] if part.startswith("blk") else part]
            name = (
                f"model.layers.{part.split('.')[1]}.{inside}.weight" if "blk" in part else f"{inside}.weight"
            )
            found = tensors.expanded(name).float().numpy()
            if inside in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = "num_attention_heads" if "q_" in inside else "num_key_value_heads"
                found = turned(found, config[heads])
            assert np.array_equal(found, wanted), name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_logits_are_those_of_transformers(plain: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    file = made(plain, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = load_model(unfolded(file, tmp_path / "cache"), dtype="float32")
    ids = torch.tensor([[11, 52, 97, 200, 33, 64, 120, 7]])
    with torch.no_grad():
        one, other = theirs(ids).logits, ours(ids).logits
    assert float((one - other).abs().max()) < 1e-5 * float(one.std())


def test_the_tokenizer_is_the_one_it_was_made_of(plain: Path, tmp_path: Path) -> None:
    folder = unfolded(made(plain, tmp_path / "model.gguf", "F16"), tmp_path / "cache")
    one, other = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (plain, folder))
    for text in (*TEXTS, "Hello  world,\t1234\n\n é 日本 🙂 don't"):
        assert one.encode(text).ids == other.encode(text).ids
        assert one.decode(one.encode(text).ids) == other.decode(one.encode(text).ids)
    assert unfolded(tmp_path, tmp_path / "cache") == folder  # found by its folder; made once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"scaling": gguf.RopeScalingType.YARN}, "scales positions by yarn"),
        ({"tokenizer": "bert"}, "kind 'bert'"),
        ({"pre": "tekken"}, "rules of 'tekken'"),
    ],
)
def test_what_is_not_read_is_refused(plain: Path, tmp_path: Path, changes: Any, message: str) -> None:
    file = made(plain, tmp_path / "model.gguf", "Q4_0", **changes)
    with pytest.raises(ConfigError, match=message):
        unfolded(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/*/config.json"))


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_damaged_file_is_refused(damaged: Path, cut: float, seed: int) -> None:
    """Cut short or with bytes changed in its header: a typed error, or the same tensors."""
    data = bytearray(damaged.read_bytes())
    size = int(cut * (len(data) - 1))
    broken = damaged.with_name("broken.gguf")
    broken.write_bytes(data[:size])
    with pytest.raises((UntrustedInput, ConfigError)):
        read(broken)
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, 400, 3):
        data[place] = rng.integers(0, 256)
    broken.write_bytes(data)
    with suppress(UntrustedInput, ConfigError):
        read(broken)


@pytest.fixture(scope="module")
def damaged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(plain, tmp_path_factory.mktemp("damaged") / "model.gguf", "Q4_0")


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_blocks_invert(rows: int, blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = torch.from_numpy(rng.standard_normal((rows, blocks)).astype(np.float16))
    packed = torch.from_numpy(rng.integers(0, 256, (rows, 16 * blocks)).astype(np.uint8))
    codes = torch.from_numpy(rng.integers(0, 256, (rows, 32 * blocks)).astype(np.uint8))
    zeros = torch.from_numpy(rng.integers(0, 16, (rows, blocks)).astype(np.uint8))
    for given_, (found, again) in (
        (packed, ggml.q4_0(ggml.to_q4_0(packed, scales), rows)),
        (codes, ggml.q8_0(ggml.to_q8_0(codes, scales), rows)),
    ):
        assert torch.equal(found, given_)
        assert torch.equal(again, scales)
    minima = -zeros.float() * scales.float()
    found, again, low = ggml.q4_1(ggml.to_q4_1(packed, scales, minima), rows)
    assert torch.equal(found, packed)
    assert torch.equal(ggml.zero_points(again, low), zeros.where(scales != 0, torch.zeros_like(zeros)))


def test_a_file_without_a_config_is_no_folder_by_itself(plain: Path, tmp_path: Path) -> None:
    made(plain, tmp_path / "one.gguf", "Q4_0")
    made(plain, tmp_path / "two.gguf", "Q4_0")
    with pytest.raises(ConfigError, match="holds 2 GGUF files"):
        unfolded(tmp_path, tmp_path / "cache")


def test_a_model_of_integers_says_so(plain: Path, tmp_path: Path) -> None:
    folder = unfolded(made(plain, tmp_path / "model.gguf", "Q4_0"), tmp_path / "cache")
    tensors, config = open_model(folder)
    assert config["quantization_config"]["symmetric"] is True
    assert "lm_head.qweight" in tensors
    assert "model.embed_tokens.weight" in tensors
