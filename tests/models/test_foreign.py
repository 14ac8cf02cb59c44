"""Models that other tools stored, in our layout: against packers written from the formats' specifications."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from foreign_kit import (
    awq_words,
    bitsandbytes_folder,
    change_config,
    draw,
    foreign,
    gptq_tensors,
    stream,
)
from olive.errors import ConfigError
from olive.models.hf import describe, load_model, open_model
from olive.models.quantised import layer_of
from olive.quantization import layouts
from olive.quantization.packing import pack, unpack
from tiny import tiny_llama

LAYER = "model.layers.1.mlp.down_proj"
KINDS = [
    ("gptq", 4, 32, False), ("gptq", 4, 32, True), ("gptq", 8, 64, False), ("gptq", 2, 32, False),
    ("gptq", 3, 32, False), ("gptq", 3, 32, True), ("gptq", 4, -1, False), ("gptq_v2", 4, 32, False),
    ("gptq_v2", 8, 32, True), ("awq", 4, 32, False), ("awq", 4, 64, False), ("pack-quantized", 4, 32, True),
    ("pack-quantized", 4, 32, False), ("pack-quantized", 8, 64, False), ("pack-quantized", 4, -1, True),
    ("int-quantized", 8, 32, True), ("int-quantized", 8, -1, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return tiny_llama(folder, hidden=64, intermediate_size=192, tie_word_embeddings=False)


@pytest.mark.parametrize(("kind", "bits", "group", "sym"), KINDS)
def test_integers_are_those_of_the_file(
    plain: Path, tmp_path: Path, kind: str, bits: int, group: int, sym: bool
) -> None:
    wanted = foreign(plain, tmp_path, kind, bits=bits, group=group, sym=sym)
    tensors, config = open_model(tmp_path)
    info = describe(tmp_path)
    assert info.tensors == tensors.layout
    assert config["quantization_config"]["quant_method"] == "olive"
    with tensors:
        for name, one in wanted.items():
            layer = layer_of(config, name)
            made = {part: tensors[f"{name}.{part}"] for part in ("qweight", "scales")}
            assert torch.equal(unpack(made["qweight"], layer.bits, one.codes.shape[1]).int(), codes(one))
            repeated = one.codes.shape[1] // one.scales.shape[1] // layer.group_size
            assert torch.equal(made["scales"], torch.from_numpy(np.repeat(one.scales, repeated, 1)))
            if layer.symmetric:
                assert f"{name}.qzeros" not in tensors
            else:
                zeros = unpack(tensors[f"{name}.qzeros"], layer.bits, made["scales"].shape[1])
                assert torch.equal(zeros.int(), torch.from_numpy(np.repeat(one.zeros, repeated, 1)).int())
            for part in made:
                assert tuple(made[part].shape) == tensors.shape(f"{name}.{part}")
    model = load_model(tmp_path, dtype="float32")
    loaded = model.get_submodule(LAYER).weight.double()
    assert torch.allclose(loaded, wanted[LAYER].dequantised(), rtol=1e-6, atol=0)


def codes(one: Any) -> torch.Tensor:
    return torch.from_numpy(one.codes).int()


@run_settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5).map(lambda n: 8 * n),
    words=st.integers(1, 6),
    bits=st.sampled_from([2, 3, 4, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_layouts_are_the_specifications_and_invert(rows: int, words: int, bits: int, seed: int) -> None:
    columns = 32 * words
    drawn = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns))
    given_codes, packed = torch.from_numpy(drawn).to(torch.uint8), None
    packed = pack(given_codes, bits)
    down = torch.from_numpy(np.ascontiguousarray(stream(drawn, bits).T))
    assert torch.equal(layouts.words_down(down), packed)
    assert torch.equal(layouts.to_words_down(packed), down)
    across = torch.from_numpy(stream(drawn, bits))
    assert torch.equal(layouts.words_across(across, bits, columns), given_codes)
    assert torch.equal(layouts.to_words_across(given_codes, bits), across)
    assert torch.equal(layouts.plus_one(layouts.less_one(given_codes, bits), bits), given_codes)
    if bits == 4:
        awq = torch.from_numpy(awq_words(drawn.T))
        assert torch.equal(layouts.awq_bytes(awq), packed)
        assert torch.equal(layouts.to_awq_words(packed), awq)
        flat = torch.from_numpy(awq_words(drawn))
        assert torch.equal(layouts.awq_codes(flat), given_codes)
        assert torch.equal(layouts.to_awq_code_words(given_codes), flat)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_groups_in_another_order_are_exact(plain: Path, tmp_path: Path) -> None:
    """A ``g_idx`` that only renumbers blocks is an order of scales."""
    wanted = foreign(plain, tmp_path, "gptq", group=32)[LAYER]
    order = np.array([3, 0, 5, 1, 4, 2])

    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        back = np.argsort(order)
        moved = type(wanted)(4, wanted.codes, wanted.zeros[:, back], wanted.scales[:, back])
        made = gptq_tensors(LAYER, moved, index=np.repeat(order, 32))
        tensors.update({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in made.items()})

    rewrite(tmp_path, shuffle)
    given_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=given_config | {"desc_act": True})
    loaded = load_model(tmp_path, dtype="float32").get_submodule(LAYER).weight
    assert torch.allclose(loaded.double(), wanted.dequantised(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("declared", [True, False])
def test_a_real_activation_order_is_refused(plain: Path, tmp_path: Path, declared: bool) -> None:
    foreign(plain, tmp_path, "gptq")

    def scatter(tensors: dict[str, torch.Tensor]) -> None:
        index = tensors[f"{LAYER}.g_idx"]
        tensors[f"{LAYER}.g_idx"] = index[torch.randperm(len(index), generator=torch.manual_seed(0))]

    rewrite(tmp_path, scatter)
    given_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=given_config | {"desc_act": declared})
    with pytest.raises(ConfigError, match=rf"{LAYER} has an activation order"):
        describe(tmp_path) if declared else load_model(tmp_path, dtype="float32")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq", {"bits": 5}, "bits 5"),
        ("gptq", {"bits": "four"}, "no whole number"),
        ("gptq", {"group_size": 16}, "in blocks of 16 need"),
        ("gptq", {"group_size": 48}, "blocks of 48"),
        ("gptq", {"quant_method": "aqlm"}, "stored quantised .aqlm."),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("pack-quantized", {"format": "float-quantized"}, "format 'float-quantized'"),
        ("pack-quantized", {"config_groups": {}}, "no config_groups"),
        ("pack-quantized", {"quantization_status": "frozen"}, "status frozen"),
        ("gptq", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit weights"),
    ],
)
def test_what_is_not_read_is_refused_from_headers(
    plain: Path, tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    foreign(plain, tmp_path, kind)
    given_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=given_config | change)
    with pytest.raises(ConfigError, match=message) as caught:
        describe(tmp_path)
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("gptq", "scales", r"no .*down_proj.scales"),
        ("gptq", "qzeros", r"no .*down_proj.qzeros"),
        ("awq", "scales", r"no .*down_proj.scales"),
        ("pack-quantized", "weight_scale", r"no .*down_proj.weight_scale"),
        ("pack-quantized", "weight_zero_point", r"no .*weight_zero_point"),
    ],
)
def test_a_missing_part_is_named(plain: Path, tmp_path: Path, kind: str, part: str, message: str) -> None:
    foreign(plain, tmp_path, kind)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.{part}"))
    with pytest.raises(ConfigError, match=message):
        describe(tmp_path)


@pytest.mark.parametrize(
    ("kind", "part"), [("gptq", "qzeros"), ("gptq", "scales"), ("awq", "qweight"), ("awq", "qzeros")]
)
def test_a_part_of_the_wrong_shape_is_named(plain: Path, tmp_path: Path, kind: str, part: str) -> None:
    foreign(plain, tmp_path, kind)
    name = f"{LAYER}.{part}"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(ConfigError, match=LAYER):
        describe(tmp_path)


def test_zero_points_that_are_not_symmetric_are_found(plain: Path, tmp_path: Path) -> None:
    """A folder of the second version that says it is of the first: every zero point is one off."""
    foreign(plain, tmp_path, "gptq_v2", sym=True)
    given_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=given_config | {"checkpoint_format": "gptq"})
    with pytest.raises(ConfigError, match=r"zero points of .* from 9 to 9, not 8"):
        load_model(tmp_path, dtype="float32")


def test_dynamic_settings_of_single_layers(plain: Path, tmp_path: Path) -> None:
    foreign(plain, tmp_path, "gptq")
    one = draw(np.random.default_rng(5), 64, 192, 8, 64)

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        made = gptq_tensors(LAYER, one)
        tensors.update({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in made.items()})

    rewrite(tmp_path, replace)
    given_config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    dynamic = {"-:lm_head": {}, r"+:.*layers\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64}}
    change_config(tmp_path, quantization_config=given_config | {"dynamic": dynamic})
    loaded = load_model(tmp_path, dtype="float32").get_submodule(LAYER).weight
    assert torch.allclose(loaded.double(), one.dequantised(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_weights_are_its_own(plain: Path, tmp_path: Path, kind: str, double: bool) -> None:
    """Bit for bit what bitsandbytes itself makes of the same bytes."""
    wanted = bitsandbytes_folder(plain, tmp_path, kind, double=double)
    info = describe(tmp_path)
    assert "quantization_config" not in info.config
    assert "no uniform grid" in info.notes[0]
    tensors, _ = open_model(tmp_path)
    with tensors:
        for name, value in wanted.items():
            assert tensors.layout[name] == ("BF16", tuple(value.shape))
            assert torch.equal(tensors[name], value)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.weight.absmax"))
    with pytest.raises(ConfigError, match="absmax"):
        describe(tmp_path)
