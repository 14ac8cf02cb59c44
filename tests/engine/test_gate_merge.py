"""The merge gate passes what is right and catches what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_kit import artifact, context, make_adapter
from olive.config.gates import MergeGate
from olive.engine.gates import merge as gate
from olive.engine.result import GateResult
from olive.errors import OliveError, PassFailed
from olive.models.hf import load_model
from olive.passes.adapters.merge import MergeAdapterWeights

PROMPTS = [[5, 9, 40, 77, 120, 33], [7, 8, 200, 14]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_phi3(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def sound(base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right merge."""
    ctx = context(tmp_path_factory.mktemp("merge"))
    MergeAdapterWeights().run(artifact(base, trained), MergeAdapterWeights.Params(), ctx)
    return ctx.out


def check(base: Path, adapter: Path, merged: Path, **settings: Any) -> GateResult:
    ctx = context(merged.parent / f"gate-{len(list(merged.parent.iterdir()))}")
    return gate.check(artifact(base, adapter), merged, MergeGate(**settings), ctx, PROMPTS)


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change one tensor of a safetensors file."""
    from safetensors.torch import load_file, save_file

    path = next(folder.glob("*model.safetensors"))
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    chosen = next(key for key in tensors if name in key)
    tensors[chosen] = change(tensors[chosen])
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_right_merge_passes(base: Path, trained: Path, sound: Path) -> None:
    result = check(base, trained, sound)
    assert result.passed
    assert result.figures["kl"] < 1e-6
    assert result.figures["changed"] == result.figures["targets"] == 4
    assert result.figures["kept"] == pytest.approx(1, abs=1e-5)
    assert result.limits == {"kl": 1e-6, "min_kept": 0.5}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("layers.1.self_attn.o_proj", lambda x: x + 1e-3, "not scale times B A"),
        ("layers.0.mlp.down_proj", lambda x: x + 1e-3, "differs from the base"),
        ("layers.0.self_attn.qkv_proj", lambda x: x * float("nan"), "NaN or infinity in .*qkv_proj"),
        ("layers.0.mlp.gate_up_proj", lambda x: x / 0, "NaN or infinity in .*gate_up_proj"),
        ("layers.1.self_attn.qkv_proj", lambda x: x[:-1].clone(), "has shape"),
    ],
)
def test_a_wrong_tensor_is_caught(
    base: Path, trained: Path, sound: Path, tmp_path: Path, name: str, change: Any, says: str
) -> None:
    merged = shutil.copytree(sound, tmp_path / "merged")
    edit(merged, name, change)
    with pytest.raises(PassFailed, match=says):
        check(base, trained, merged)


def test_a_target_left_as_it_was_is_caught(base: Path, trained: Path, sound: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    merged = shutil.copytree(sound, tmp_path / "merged")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    original = load_file(base / "model.safetensors")[name]
    edit(merged, name, lambda _: original.clone())
    with pytest.raises(PassFailed, match="did not change"):
        check(base, trained, merged)


def test_half_the_change_is_caught(base: Path, trained: Path, sound: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    merged = shutil.copytree(sound, tmp_path / "merged")
    name = "model.layers.0.self_attn.o_proj.weight"
    original = load_file(base / "model.safetensors")[name]
    edit(merged, name, lambda value: original + (value - original) / 2)
    with pytest.raises(PassFailed, match="not scale times B A"):
        check(base, trained, merged)


def test_a_missing_and_a_surplus_tensor_are_caught(
    base: Path, trained: Path, sound: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {key: value.clone() for key, value in load_file(sound / "model.safetensors").items()}
    merged = shutil.copytree(sound, tmp_path / "merged")
    save_file({k: v for k, v in tensors.items() if "norm" not in k}, merged / "model.safetensors")
    with pytest.raises(PassFailed, match="lacks model"):
        check(base, trained, merged)
    save_file(tensors | {"extra.weight": tensors["model.norm.weight"].clone()}, merged / "model.safetensors")
    with pytest.raises(PassFailed, match=r"has extra\.weight, which the base has not"):
        check(base, trained, merged)


def test_a_config_that_means_another_model_is_caught(
    base: Path, trained: Path, sound: Path, tmp_path: Path
) -> None:
    merged = shutil.copytree(sound, tmp_path / "merged")
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(PassFailed, match=r"KL\(base \+ adapter, merged\)"):
        check(base, trained, merged)


@pytest.mark.parametrize(("std", "sound"), [(0.1, True), (1e-5, False)])
def test_a_change_below_the_resolution_of_the_dtype_is_caught(
    base: Path, tmp_path: Path, std: float, sound: bool
) -> None:
    half = tmp_path / "half"
    load_model(base, dtype="bfloat16").save_pretrained(half)
    adapter = make_adapter(base, tmp_path / "adapter", std=std)
    ctx = context(tmp_path / "run")
    MergeAdapterWeights().run(artifact(half, adapter), MergeAdapterWeights.Params(), ctx)
    if sound:
        assert check(half, adapter, ctx.out).figures["kept"] == pytest.approx(1, abs=0.02)
    else:
        with pytest.raises(PassFailed, match=r"left after rounding|did not change") as caught:
            check(half, adapter, ctx.out)
        assert "float32" in str(caught.value.problems[0].fix)


def test_one_target_without_change_is_caught(base: Path, trained: Path, tmp_path: Path) -> None:
    partly = shutil.copytree(trained, tmp_path / "partly")
    edit(partly, "layers.1.self_attn.o_proj.lora_B", lambda b: b * 0)
    with pytest.raises(PassFailed, match=r"layers\.1\.self_attn\.o_proj\.weight .* did not change") as caught:
        merge_and_check(base, partly, tmp_path / "run")
    assert "B is zero" in str(caught.value.problems[0].fix)


def test_rows_are_looked_at_in_blocks(
    base: Path, trained: Path, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_CELLS", 500)
    assert check(base, trained, sound).figures["targets"] == 4
    merged = shutil.copytree(sound, tmp_path / "merged")

    def first_row(value: Any) -> Any:
        value[0] += 1e-3
        return value

    edit(merged, "layers.1.self_attn.o_proj", first_row)
    with pytest.raises(PassFailed, match="not scale times B A"):
        check(base, trained, merged)


def merge_and_check(base: Path, adapter: Path, folder: Path) -> None:
    """The pass and its gate, as a run does them."""
    ctx = context(folder)
    MergeAdapterWeights().run(artifact(base, adapter), MergeAdapterWeights.Params(), ctx)
    check(base, adapter, ctx.out)


def test_a_zero_adapter_is_caught(base: Path, tmp_path: Path) -> None:
    zero = make_adapter(base, tmp_path / "zero", std=0)
    with pytest.raises(PassFailed, match="did not change"):
        merge_and_check(base, zero, tmp_path / "run")


def test_a_foreign_prefix_is_caught(base: Path, trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    foreign = shutil.copytree(trained, tmp_path / "foreign")
    path = foreign / "adapter_model.safetensors"
    tensors = {k.replace("base_model.model.", "transformer."): v.clone() for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(OliveError, match=r"transformer|unused|fit"):
        merge_and_check(base, foreign, tmp_path / "run")


def test_a_foreign_prefix_is_caught_by_the_gate_alone(
    base: Path, trained: Path, sound: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    foreign = shutil.copytree(trained, tmp_path / "foreign")
    path = foreign / "adapter_model.safetensors"
    save_file({f"x.{k}": v.clone() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(PassFailed, match="unused"):
        check(base, foreign, sound)


def test_a_base_of_another_seed_is_caught(trained: Path, sound: Path, tmp_path: Path) -> None:
    other = tiny.tiny_phi3(tmp_path / "other", seed=5)
    with pytest.raises(PassFailed, match=r"differs from the base|not scale times"):
        check(other, trained, sound)


def test_a_base_of_another_shape_is_caught(trained: Path, tmp_path: Path) -> None:
    other = tiny.tiny_phi3(tmp_path / "other", hidden=32)
    with pytest.raises(OliveError, match=r"shape|fit"):
        merge_and_check(other, trained, tmp_path / "run")


def test_a_base_that_is_not_the_recorded_one_is_caught(base: Path, trained: Path, sound: Path) -> None:
    ctx = context(sound.parent / "recorded")
    model = artifact(base, trained, base_digest="f" * 64)
    with pytest.raises(PassFailed, match="another base"):
        gate.check(model, sound, MergeGate(), ctx, PROMPTS)
