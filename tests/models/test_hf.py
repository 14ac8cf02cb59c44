"""Model folders: described without torch, loaded whole or refused, saved for every reader."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from olive.errors import ConfigError, EnvironmentFault, OliveError, UntrustedInput
from olive.models.artifact import Kind, ModelInfo
from olive.models.hf import (
    describe,
    linear_modules,
    load_model,
    load_tokenizer,
    native_architecture,
    needs_remote_code,
    portable_config,
    save_model,
)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(tmp_path_factory.mktemp("phi3"))


@pytest.fixture
def copy(phi3: Path, tmp_path: Path) -> Path:
    return shutil.copytree(phi3, tmp_path / "model")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_describe(phi3: Path) -> None:
    info = describe(phi3)
    assert info.kind is Kind.HF
    assert info.architecture == "Phi3ForCausalLM"
    assert info.tensors["model.layers.0.self_attn.o_proj.weight"] == ("F32", (64, 64))
    # embedding; in each layer qkv (64 + 2 * 32 rows), o, gate_up, down and two norms; the last norm
    assert info.parameters == 384 * 64 + 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128 + 2 * 64) + 64
    assert not info.chat_template


def test_linear_modules(phi3: Path) -> None:
    assert linear_modules(describe(phi3)) == {"qkv_proj": 2, "o_proj": 2, "gate_up_proj": 2, "down_proj": 2}


def test_embeddings_are_no_linear_modules() -> None:
    names = (
        "transformer.wte",
        "transformer.wpe",
        "bert.embeddings.word_embeddings",
        "shared",
        "lm_head",
        "h.0.c_attn",
    )
    tensors = {f"{name}.weight": ("F32", (4, 4)) for name in names}
    info = ModelInfo(path=Path(), kind=Kind.HF, config={}, tensors=tensors)
    assert linear_modules(info) == {"lm_head": 1, "c_attn": 1}


def test_describing_imports_nothing_heavy_and_is_fast(phi3: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from olive.models.hf import describe, native_architecture\n"
        f"start = time.perf_counter(); info = describe(Path({str(phi3)!r}))\n"
        "assert native_architecture(info)\n"
        "assert time.perf_counter() - start < 0.25\n"  # 0.003 s when idle
        "heavy = {'torch', 'transformers', 'safetensors', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_template_is_seen(copy: Path, where: str) -> None:
    text = json.dumps({"chat_template": "{{ x }}"}) if where.endswith("json") else "{{ x }}"
    (copy / where).write_text(text)
    assert describe(copy).chat_template


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        describe(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        describe(tmp_path / "file")


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json") as caught:
        describe(copy)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": '])
def test_a_damaged_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        describe(copy)


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        describe(copy)


def test_pickled_weights_are_refused_unread(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch payload'\ntR.")
    for look in (describe, lambda folder: load_model(folder, dtype="float32")):
        with pytest.raises(UntrustedInput, match="only as pickle") as caught:
            look(copy)
        assert caught.value.exit_code == 6


def test_truncated_weights_are_refused_before_loading(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for look in (describe, lambda folder: load_model(folder, dtype="float32")):
        with pytest.raises(UntrustedInput, match="truncated"):
            look(copy)


def test_adapter_and_genai_folders(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        describe(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(UntrustedInput, match="pickle"):
        describe(tmp_path)
    (tmp_path / "genai_config.json").write_text("{}")
    assert describe(tmp_path).kind is Kind.GENAI


@pytest.mark.parametrize(
    ("model_type", "architecture", "native"),
    [
        ("phi3", "Phi3ForCausalLM", True),
        ("llama", "LlamaForCausalLM", True),
        ("qwen2", "Qwen2ForCausalLM", True),
        ("phi3", "Phi3SmallForCausalLM", False),
        ("phi3small", "Phi3SmallForCausalLM", False),
        ("", "", False),
    ],
)
def test_native_architecture(model_type: str, architecture: str, native: bool) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    assert native_architecture(ModelInfo(path=Path(), kind=Kind.HF, config=config, tensors={})) is native


def test_remote_code_never_runs_for_a_known_architecture(copy: Path) -> None:
    change_config(copy, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"})
    (copy / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert needs_remote_code(describe(copy).config)
    assert type(load_model(copy, dtype="float32", trust_remote_code=True)).__name__ == "Phi3ForCausalLM"


def test_remote_code_needs_leave(copy: Path) -> None:
    change_config(
        copy, model_type="evil", architectures=["Evil"], auto_map={"AutoModelForCausalLM": "evil.Evil"}
    )
    (copy / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(UntrustedInput, match="its own code for Evil"):
        load_model(copy, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_model(phi3: Path, dtype: Any) -> None:
    import torch

    model = load_model(phi3, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_loading_leaves_the_library_as_it_was(phi3: Path) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_model(phi3, dtype="float32")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


@pytest.mark.parametrize(
    ("change", "message", "error"),
    [
        ({"hidden_size": 128}, "wrong shape", ConfigError),
        ({"num_hidden_layers": 3}, "has no model.layers.2", ConfigError),
        ({"num_hidden_layers": 1}, "more layers than its config", ConfigError),
        ({"num_attention_heads": "four"}, "num_attention_heads", ConfigError),
        ({"model_type": "zzz", "architectures": ["Zzz"]}, "does not know Zzz", EnvironmentFault),
    ],
)
def test_config_and_weights_must_fit(
    copy: Path, change: dict[str, Any], message: str, error: type[OliveError]
) -> None:
    change_config(copy, **change)
    with pytest.raises(error, match=message):
        load_model(copy, dtype="float32")


def test_a_missing_tensor_is_never_invented(copy: Path) -> None:
    change_tensors(copy, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(ConfigError, match=r"has no model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(copy, dtype="float32")


def test_load_tokenizer(phi3: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(phi3)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|end|>", "<pad>", None)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_save_model_round_trip(copy: Path, tmp_path: Path) -> None:
    import torch

    (copy / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend",  "eos_token": "<|end|>"}'
    )
    (copy / "generation_config.json").write_text(
        '{"temperature": 0.5, "do_sample": false, "eos_token_id": [3, 4]}'
    )
    model = load_model(copy, dtype="float32")
    model.config.quantization_config = {"quant_method": "gguf"}
    out = tmp_path / "out"
    save_model(model, copy, out)
    again = load_model(out, dtype="float32")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (out / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    settings = (out / "tokenizer_config.json").read_text()
    assert settings == '{"tokenizer_class": "PreTrainedTokenizerFast",  "eos_token": "<|end|>"}'
    assert (out / "generation_config.json").read_bytes() == (copy / "generation_config.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


def test_equal_models_make_equal_bytes_wherever_they_came_from(
    phi3: Path, copy: Path, tmp_path: Path
) -> None:
    for number, folder in enumerate((phi3, copy)):
        save_model(load_model(folder, dtype="float32"), folder, tmp_path / str(number))
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes(), path.name


def test_portable_config_keeps_a_scaled_rope_for_transformers_4() -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    config = portable_config({"rope_parameters": rope, "dtype": "bfloat16", "_name_or_path": "/home/someone"})
    assert config == {
        "rope_parameters": rope,
        "rope_scaling": rope,
        "rope_theta": 500.0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def test_a_portable_config_means_the_same_to_this_transformers(tmp_path: Path) -> None:
    import torch

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    folder = tiny.tiny_llama(tmp_path / "a", rope_parameters=rope)
    model = load_model(folder, dtype="float32")
    save_model(model, folder, tmp_path / "b")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert torch.equal(load_model(tmp_path / "b", dtype="float32")(ids).logits, expected)
        plain = tiny.tiny_llama(tmp_path / "c")
        assert not torch.equal(load_model(plain, dtype="float32")(ids).logits, expected)
