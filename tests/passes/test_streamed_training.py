"""Training on data that is read as a stream: the same adapter, bit for bit, and tokens made once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_lora_training import adapter, params, train

from olive.config.workflow import DataConfig
from olive.data.tokens import LightTokenizer
from tiny import tiny_phi3
from training_kit import data, rows


def streamed(config: DataConfig) -> DataConfig:
    load = config.load_dataset_config.model_copy(update={"streaming": True})
    return config.model_copy(update={"load_dataset_config": load})


@pytest.mark.parametrize("pre", [{"train_on": "completion"}, {"strategy": "pack", "max_seq_len": 96}])
def test_the_adapter_is_the_same(tmp_path: Path, pre: dict[str, Any]) -> None:
    base, config = tiny_phi3(tmp_path / "base"), data(rows(tmp_path), **pre)
    args = {"eval_strategy": "steps", "eval_steps": 2, "train_sampling_strategy": "group_by_length"}
    wanted = params(eval_dataset_size=6, training_args=args)
    held = train(base, tmp_path / "held", config, wanted)
    found = train(base, tmp_path / "streamed", streamed(config), wanted)
    assert found.facts["streamed"] == ["train"]
    assert "streamed" not in held.facts
    for name in ("loss", "eval_loss"):
        assert [p.get(name) for p in held.series["loss"]] == [p.get(name) for p in found.series["loss"]]
    for name in ("rows", "blocks", "eval_blocks", "block_tokens", "label_tokens", "micro_batch"):
        assert held.facts[name] == found.facts[name], name
    weights = adapter(found)
    assert all(bool((tensor == weights[name]).all()) for name, tensor in adapter(held).items())


def test_workers_and_evaluation_data_of_its_own(tmp_path: Path) -> None:
    base, config = tiny_phi3(tmp_path / "base"), data(rows(tmp_path))
    wanted = params(eval_data_config="train", training_args={"eval_strategy": "epoch", "max_steps": 3})
    several = params(
        eval_data_config="train",
        training_args={"eval_strategy": "epoch", "max_steps": 3, "dataloader_num_workers": 2},
    )
    held = train(base, tmp_path / "held", config, wanted)
    found = train(base, tmp_path / "streamed", streamed(config), several)
    assert [p.get("loss") for p in held.series["loss"]] == [p.get("loss") for p in found.series["loss"]]
    assert held.facts["eval_blocks"] == found.facts["eval_blocks"] == 24


def test_a_run_that_goes_on_makes_no_tokens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, config = tiny_phi3(tmp_path / "base"), streamed(data(rows(tmp_path)))
    wanted = params(training_args={"max_steps": 3})
    first = train(base, tmp_path / "a", config, wanted)
    assert (first.journal.path / "tokens" / "index.json").exists()
    monkeypatch.setattr(LightTokenizer, "encode_rows", None)
    again = train(base, tmp_path / "a", config, wanted)
    assert any("step 3" in note for note in again.progress.notes)  # type: ignore[attr-defined]
    first.journal.clear()
    assert not first.journal.path.exists()
