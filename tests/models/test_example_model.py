"""The example's base model: the repacking is exact, and a folder is taken for ready only when it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import tiny
from olive.models.hf import load_model

SCRIPT = Path(__file__).parents[2] / "examples" / "phi3-tone" / "prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("phi3_tone_prepare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out", str(out)])
    return int(prepare.main())


def test_a_llama_repacked_as_phi3_computes_the_same(prepare: ModuleType, tmp_path: Path) -> None:
    import torch

    rope = {"rope_type": "default", "rope_theta": 100000.0}
    folder = tiny.tiny_llama(tmp_path / "llama", rope_parameters=rope, rms_norm_eps=1e-5)
    llama = load_model(folder, dtype="float32")
    for value in llama.parameters():  # norms that are not all ones
        value.data += 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    (tmp_path / "phi3").mkdir()
    prepare._save(llama.config, prepare.repack(llama.state_dict()), "float32", tmp_path / "phi3")
    phi3 = load_model(tmp_path / "phi3", dtype="float32")
    assert type(phi3).__name__ == "Phi3ForCausalLM"
    ids = torch.arange(60)[None]
    with torch.inference_mode():
        # The products of the fused matrices may be summed in another order: a few float32 roundings.
        torch.testing.assert_close(phi3(ids).logits, llama(ids).logits, rtol=0, atol=2e-6)


def test_the_dtype_is_narrowed_only_when_nothing_is_lost(prepare: ModuleType) -> None:
    import torch

    assert prepare._narrowest({"w": torch.tensor([1.0, 0.5, -3.0])}) == "bfloat16"
    assert prepare._narrowest({"w": torch.tensor([1.0, 0.1])}) == "float32"


def test_a_prepared_folder_is_known_and_a_damaged_one_is_not(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "phi-3-mini"
    out.mkdir()
    (out / "config.json").write_text("{}")
    marker = {
        "source": prepare.GGUF_SHA256,
        "recipe": prepare.RECIPE,
        "files": {"config.json": prepare._sha256(out / "config.json")},
    }
    (out / prepare.MARKER).write_text(json.dumps(marker))
    assert run(prepare, monkeypatch, out) == 0

    def redo(scratch: Path) -> None:
        (scratch / "model").mkdir()
        (scratch / "model" / "config.json").write_text("new")

    monkeypatch.setattr(prepare, "_prepare", redo)
    (out / "config.json").write_text("{ }")
    assert run(prepare, monkeypatch, out) == 0
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["phi-3-mini"]


def test_a_folder_of_someone_else_is_left_alone(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "phi-3-mini"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(SystemExit, match="was not made by this script"):
        run(prepare, monkeypatch, out)
    assert (out / "mine").read_text() == "x"


def test_a_failed_preparation_leaves_nothing(
    prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(scratch: Path) -> None:
        (scratch / "model").mkdir()
        raise SystemExit("no network")

    monkeypatch.setattr(prepare, "_prepare", fail)
    with pytest.raises(SystemExit, match="no network"):
        run(prepare, monkeypatch, tmp_path / "phi-3-mini")
    assert list(tmp_path.iterdir()) == []
