"""Folders as GPTQ, AWQ, compressed-tensors and bitsandbytes store them, packed a bit at a time in numpy.

The packers follow the formats' specifications word by word, and share no code with the product.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, Any]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass
class Stored:
    """What a layer's integers are: codes (rows, columns), zero points and scales (rows, blocks)."""

    bits: int
    codes: Array
    zeros: Array
    scales: Array

    def dequantised(self) -> torch.Tensor:
        width = self.codes.shape[1] // self.scales.shape[1]
        steps = self.codes.astype(np.int64) - np.repeat(self.zeros, width, 1)
        return torch.from_numpy(steps * np.repeat(self.scales.astype(np.float64), width, 1))


def stream(codes: Array, bits: int) -> Array:
    """int32 words (rows, n x bits / 32): the codes of each row as one stream of bits, low bits first."""
    rows = []
    for row in codes:
        value = 0
        for place, code in enumerate(row):
            value |= int(code) << (place * bits)
        size = -(-len(row) * bits // 32)
        rows.append([(value >> (32 * word)) & 0xFFFFFFFF for word in range(size)])
    return np.array(rows, dtype=np.uint64).astype(np.uint32).view(np.int32)


def awq_words(codes: Array) -> Array:
    """int32 (rows, n / 8); half byte ``i`` of a word holds code ``AWQ_ORDER[i]`` of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), dtype=np.uint32)
    for place, source in enumerate(AWQ_ORDER):
        words |= codes[:, source::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def draw(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, *, sym: bool = False
) -> Stored:
    """A random layer."""
    blocks = columns // (columns if group == -1 else group)
    zeros = np.full((rows, blocks), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (rows, blocks))
    scales = (rng.random((rows, blocks)) + 0.5).astype(np.float16) * np.float16(0.1 / 2**bits)
    return Stored(bits, rng.integers(0, 2**bits, (rows, columns)), zeros, scales)


def gptq_tensors(name: str, one: Stored, *, version: int = 1, index: Array | None = None) -> dict[str, Any]:
    """Tensors of a layer as AutoGPTQ (version 1) or GPTQModel (version 2) stores them."""
    zeros = (one.zeros.T - (version == 1)) % 2**one.bits
    columns, blocks = one.codes.shape[1], one.scales.shape[1]
    plain = np.arange(columns, dtype=np.int32) // (columns // blocks)
    return {
        f"{name}.qweight": stream(one.codes, one.bits).T,
        f"{name}.qzeros": stream(zeros, one.bits),
        f"{name}.scales": one.scales.T,
        f"{name}.g_idx": plain if index is None else index.astype(np.int32),
    }


def awq_tensors(name: str, one: Stored) -> dict[str, Any]:
    """Tensors of a layer as AutoAWQ's gemm version stores them."""
    return {
        f"{name}.qweight": awq_words(one.codes.T),
        f"{name}.qzeros": awq_words(one.zeros.T),
        f"{name}.scales": one.scales.T,
    }


def packed_tensors(name: str, one: Stored, *, sym: bool) -> dict[str, Any]:
    """Tensors of a layer as compressed-tensors' pack-quantized format stores them."""
    made = {
        f"{name}.weight_packed": stream(one.codes, one.bits),
        f"{name}.weight_scale": one.scales,
        f"{name}.weight_shape": np.array(one.codes.shape, dtype=np.int64),
    }
    return made if sym else made | {f"{name}.weight_zero_point": stream(one.zeros.T, one.bits).T}


def int_tensors(name: str, one: Stored, *, sym: bool) -> dict[str, Any]:
    """Tensors of a layer as compressed-tensors' int-quantized format stores them."""
    made = {f"{name}.weight": (one.codes - 128).astype(np.int8), f"{name}.weight_scale": one.scales}
    return made if sym else made | {f"{name}.weight_zero_point": (one.zeros - 128).astype(np.int8)}


def settings(kind: str, bits: int, group: int, *, sym: bool) -> dict[str, Any]:
    """``quantization_config`` of a kind: gptq, gptq_v2, awq, pack-quantized or int-quantized."""
    if kind in ("gptq", "gptq_v2"):
        given = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": False}
        return given | {"checkpoint_format": kind}
    if kind == "awq":
        given = {"quant_method": kind, "bits": bits, "group_size": group}
        return given | {"zero_point": True, "version": "gemm"}
    whole = group == -1
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False, "observer": "minmax"}
    weights |= {"strategy": "channel" if whole else "group", "group_size": None if whole else group}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def tensors_of(kind: str, name: str, one: Stored, *, sym: bool) -> dict[str, Any]:
    """Tensors of a layer of a kind."""
    if kind in ("gptq", "gptq_v2"):
        return gptq_tensors(name, one, version=2 if kind == "gptq_v2" else 1)
    if kind == "awq":
        return awq_tensors(name, one)
    return (packed_tensors if kind == "pack-quantized" else int_tensors)(name, one, sym=sym)


def foreign(
    source: Path, folder: Path, kind: str, *, bits: int = 4, group: int = 32, sym: bool = False, seed: int = 0
) -> dict[str, Stored]:
    """Write ``source`` with random integers in its decoder layers; returns them by layer."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    made: dict[str, torch.Tensor] = {}
    stored: dict[str, Stored] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            layer = name.removesuffix(".weight")
            stored[layer] = draw(rng, *tensor.shape, bits, group, sym=sym)
            for key, value in tensors_of(kind, layer, stored[layer], sym=sym).items():
                made[key] = torch.from_numpy(np.ascontiguousarray(value))
        else:
            made[name] = tensor
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=settings(kind, bits, group, sym=sym))
    return stored


def change_config(folder: Path, **values: Any) -> None:
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))


def turned(value: Any, heads: int) -> Any:
    """Rows of q and k as llama.cpp's converter puts them."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def gguf_file(source: Path, path: Path, kind: str, **changes: Any) -> Path:
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
            data = _as_gguf(value, raw)
            writer.add_tensor(f"{place}.weight", data, raw_dtype=raw)
        else:
            writer.add_tensor(f"{place}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(value: Any, raw: gguf.GGMLQuantizationType) -> Any:
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


def bitsandbytes_folder(source: Path, folder: Path, kind: str, *, double: bool) -> dict[str, torch.Tensor]:
    """Write ``source`` with its decoder layers in bitsandbytes' 4 bits; returns what they stand for."""
    import bitsandbytes.functional as bnb

    folder.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, torch.Tensor] = {}
    made: dict[str, torch.Tensor] = {}
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim == 2 and ".layers." in name:
            packed, state = bnb.quantize_4bit(
                tensor.to(torch.bfloat16), blocksize=64, compress_statistics=double, quant_type=kind
            )
            made[name] = packed
            made |= {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            wanted[name] = bnb.dequantize_4bit(packed, state)
        else:
            made[name] = tensor
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    change_config(folder, quantization_config=stated)
    return wanted
