"""Figures as people read them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import sample_result as fake

from olive.engine.result import GateResult
from olive.evaluation.score import Score
from olive.report import figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (14_700_000, "14.7 MB"),
        (2_430_000_000, "2.43 GB"),
        (5.2e15, "5200 TB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert figures.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (60, "60"),
        (3_686_400, "3,686,400"),
        (2.1e-8, "2.1e-08"),
        (1e-6, "1e-06"),
        (0.0123, "0.0123"),
        (0.5, "0.5"),
        (8.3124, "8.312"),
        (1234.5, "1,234"),
        (float("nan"), "nan"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert figures.number(value) == text


def test_ratios_keep_three_decimals() -> None:
    assert figures.score_value(Score(metric="a", name="b", value=1)) == "1.000"
    assert figures.score_value(Score(metric="a", name="b", value=0.5)) == "0.500"
    assert figures.score_value(Score(metric="a", name="b", value=41.3)) == "41.3"
    assert figures.score_value(Score(metric="a", name="b", value=12.5, unit="ms")) == "12.5 ms"
    assert figures.score_value(Score(metric="a", name="b", value=121_300_000, unit="bytes")) == "121 MB"


@pytest.mark.parametrize(
    ("after", "before", "spread", "higher", "verdict"),
    [
        (0.9, 0.1, 0.03, True, "better"),
        (0.1, 0.9, 0.03, True, "worse"),
        (0.1, 0.9, 0.03, False, "better"),
        (0.90, 0.92, 0.03, True, "same"),
        (0.9, 0.9, None, True, "same"),
        (float("nan"), 0.9, None, True, ""),
    ],
)
def test_trend(after: float, before: float, spread: float | None, higher: bool, verdict: str) -> None:
    one = Score(metric="a", name="b", value=after, spread=spread, higher_is_better=higher)
    assert figures.trend(one, one.model_copy(update={"value": before})) == verdict


def test_table_has_a_column_for_each_measured_stage_and_a_dash_where_nothing_was_measured() -> None:
    result = fake.result()
    table = figures.table(result)
    assert table.columns == ("input", "lora", "builder")
    assert table.rows[0].label == "tone exact match"
    assert [cell.text for cell in table.rows[-1].cells] == ["538 MB", "+14.7 MB", "121 MB"]
    bare = figures.table(fake.result(input_scores=()))
    assert bare.rows[0].cells[0].text == "–"
    assert bare.rows[0].cells[1].trend == ""


def test_size_is_not_said_twice() -> None:
    size = Score(metric="size", name="bytes", value=121_300_000, unit="bytes", higher_is_better=False)
    last = fake.result().steps[-1]
    result = fake.result(steps=(last.model_copy(update={"scores": (*last.scores, size)}),))
    assert [row.label for row in figures.table(result).rows].count("size on disk") == 0
    assert [change.label for change in figures.changes(result)].count("size") == 1


def test_limits_say_their_direction() -> None:
    gate = GateResult(
        gate="parity",
        passed=True,
        figures={"kl": 0.2, "top1": 0.9, "agreement": 0.8, "relative_error": 1e-4, "count": 3},
        limits={"max_kl": 0.5, "min_top1": 0.7, "agreement": 0.5, "relative_error": 1e-3},
    )
    assert [(item.label, item.limit) for item in figures.gate_figures(gate)] == [
        ("KL", "at most 0.5"),
        ("top-1 agreement", "at least 0.7"),
        ("agreement", "at least 0.5"),
        ("relative error", "at most 0.001"),
        ("count", ""),
    ]


def test_headline() -> None:
    result = fake.result()
    assert figures.headline(result) == "phi-3-mini, fine-tuned with LoRA, merged and exported to int4 ONNX"
    assert figures.headline(fake.result(steps=result.steps[:1])) == "phi-3-mini, fine-tuned with LoRA"
    assert (
        figures.headline(fake.result(steps=result.steps[:1], document={}))
        == "the model, fine-tuned with LoRA"
    )


def test_a_run_from_the_cache_still_says_what_the_model_cost() -> None:
    result = fake.result()
    assert figures.effort(fake.result(steps=result.steps[:1])) == figures.Effort(512.4, 2_430_000_000, False)
    cached = tuple(step.model_copy(update={"cached": True}) for step in result.steps)
    rerun = fake.result(steps=cached, seconds=0.2, peak_memory=50_000_000)
    assert figures.effort(rerun) == figures.Effort(431.2 + 4.3 + 31.7, 2_430_000_000, True)


def test_one_tile_a_metric() -> None:
    scores = [
        Score(metric="tone", name=name, value=0.5, priority=rank) for name, rank in (("f1", -1), ("exact", 1))
    ]
    last = fake.result().steps[-1].model_copy(update={"scores": tuple(scores)})
    assert [change.label for change in figures.changes(fake.result(steps=(last,)))] == ["tone exact", "size"]


def test_a_change_too_small_to_show_is_none() -> None:
    one = Score(metric="size", name="bytes", value=411_100, unit="bytes", higher_is_better=False)
    assert figures.trend(one, one.model_copy(update={"value": 411_101})) == "same"


def test_the_layers_of_a_quantisation_are_a_table() -> None:
    rows = [
        {"name": "model.layers.0.mlp.down_proj", "bits": 4, "group_size": 32, "weight_error": 0.0075,
         "output_error": 0.00049, "seconds": 0.6},
        {"name": "lm_head", "bits": 8, "group_size": -1, "weight_error": 2e-5, "seconds": 1.0,
         "fallback": "its inputs are NaN, infinite or all zero"},
    ]  # fmt: skip
    result = fake.result()
    gate = GateResult(gate="parity", passed=True, layers={"model.layers.0.mlp.down_proj": 0.01234})
    changes = {"type": "Gptq", "facts": {"layers": rows}, "series": {}, "gates": (gate,)}
    step = result.steps[0].model_copy(update=changes)
    table = figures.layers(step)
    assert table[0] == ("model.layers.0.mlp.down_proj", "4", "32", "0.75%", "0.05%", "0.012", "0.60", "")
    assert table[1][2:6] == ("row", "0.00%", "", "")
    assert table[1][-1].startswith("its inputs")
    assert figures.layers(result.steps[0]) == []
    assert "quantised with Gptq" in figures.headline(result.model_copy(update={"steps": (step,)}))
