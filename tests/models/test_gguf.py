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

from foreign_kit import NAMES, gguf_file, turned
from olive.errors import ConfigError, UntrustedInput
from olive.models.foreign.gguf_folder import unfolded
from olive.models.foreign.gguf_header import read
from olive.models.hf import describe, load_model, open_model
from olive.models.quantised import DequantisedTensors
from olive.quantization import ggml
from tiny import TEXTS, tiny_llama


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return tiny_llama(
        folder, hidden=256, layers=1, initializer_range=0.2, tie_word_embeddings=False, num_key_value_heads=2
    )


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K", "Q4_K", "Q3_K", "Q2_K"]
)
def test_weights_are_those_of_the_gguf_package(plain: Path, tmp_path: Path, kind: str) -> None:
    """Bit for bit; kinds on no grid are expanded by the package itself, whatever their rows."""
    file = gguf_file(plain, tmp_path / "model.gguf", kind)
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

    file = gguf_file(plain, tmp_path / "model.gguf", kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = load_model(unfolded(file, tmp_path / "cache"), dtype="float32")
    ids = torch.tensor([[11, 52, 97, 200, 33, 64, 120, 7]])
    with torch.no_grad():
        one, other = theirs(ids).logits, ours(ids).logits
    assert float((one - other).abs().max()) < 1e-5 * float(one.std())


def test_the_tokenizer_is_the_one_it_was_made_of(plain: Path, tmp_path: Path) -> None:
    folder = unfolded(gguf_file(plain, tmp_path / "model.gguf", "F16"), tmp_path / "cache")
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
    file = gguf_file(plain, tmp_path / "model.gguf", "Q4_0", **changes)
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
    return gguf_file(plain, tmp_path_factory.mktemp("damaged") / "model.gguf", "Q4_0")


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
    gguf_file(plain, tmp_path / "one.gguf", "Q4_0")
    gguf_file(plain, tmp_path / "two.gguf", "Q4_0")
    with pytest.raises(ConfigError, match="holds 2 GGUF files"):
        unfolded(tmp_path, tmp_path / "cache")


def test_a_model_of_integers_says_so(plain: Path, tmp_path: Path) -> None:
    folder = unfolded(gguf_file(plain, tmp_path / "model.gguf", "Q4_0"), tmp_path / "cache")
    tensors, config = open_model(folder)
    assert config["quantization_config"]["symmetric"] is True
    assert "lm_head.qweight" in tensors
    assert "model.embed_tokens.weight" in tensors
