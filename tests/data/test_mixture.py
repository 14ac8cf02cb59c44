"""Several datasets as one: how often a row is drawn, how it becomes text, and what identifies the whole."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from olive.config.workflow import DataConfig, Workflow
from olive.data.blocks import build
from olive.data.digest import data_digest
from olive.data.mixture import MixedRow, choice, mixed
from olive.data.plan import preview
from olive.data.rows import is_local, read
from olive.data.split import split_rows
from olive.data.tokens import load
from olive.errors import ConfigError
from olive.report import console
from tiny import tiny_tokenizer

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def workflow(*configs: dict[str, Any]) -> Workflow:
    return Workflow.model_validate({"input_model": {"model_path": "m"}, "data_configs": configs})


def file_config(name: str, pre: dict[str, Any] | None = None, **load_settings: Any) -> dict[str, Any]:
    given_ = {"data_name": "json", "split": "train", "data_files": f"{name}.json", **load_settings}
    return {"name": name, "load_dataset_config": given_, "pre_process_data_config": pre or {}}


def mix_config(*parts: dict[str, Any], name: str = "mix", **pre: Any) -> dict[str, Any]:
    return {"name": name, "mix": parts, "pre_process_data_config": {"strategy": "pack", **pre}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tones = [{"phrase": f"phrase {n}", "tone": "joy"} for n in range(20)]
    talks = [{"prompt": f"ask {n}", "completion": f"yes {n}"} for n in range(10)]
    (tmp_path / "tones.json").write_text(json.dumps(tones))
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    return tiny_tokenizer(tmp_path, chat_template=CHAT)


TONES = file_config("tones", {"text_template": "{phrase} -> {tone}", "train_on": "completion"})
TALKS = file_config("talks")


def both(tones: float = 1.0, talks: float = 1.0, **pre: Any) -> DataConfig:
    parts = ({"name": "tones", "weight": tones}, {"name": "talks", "weight": talks})
    return workflow(TONES, TALKS, mix_config(*parts, **pre)).data_config("mix")


parts_of_numbers = st.lists(
    st.tuples(st.integers(0, 30), st.floats(0.01, 4, allow_nan=False)), min_size=1, max_size=4
)


@given(parts_of_numbers, st.integers(0, 9))
def test_each_row_is_drawn_as_often_as_its_weight_says(parts: list[tuple[int, float]], seed: int) -> None:
    sources = [([(place, n) for n in range(count)], weight) for place, (count, weight) in enumerate(parts)]
    drawn = mixed(sources, seed)
    counts = Counter(drawn)
    for place, (count, weight) in enumerate(parts):
        times = [counts[place, n] for n in range(count)]
        assert all(int(weight) <= number <= int(weight) + 1 for number in times)
        assert abs(sum(times) - weight * count) <= 0.5
    assert len(drawn) == sum(counts.values())
    assert drawn == mixed(sources, seed)


def test_the_seed_decides_the_half_and_the_order() -> None:
    rows = list(range(100))
    one, other = mixed([(rows, 0.5)], 0), mixed([(rows, 0.5)], 1)
    assert (len(set(one)), len(set(other))) == (50, 50)
    assert set(one) != set(other)
    assert one != sorted(one)
    assert mixed([(rows, 1.0)], 0) != mixed([(rows, 1.0)], 1)
    assert choice(rows, 10, "x") == sorted(choice(rows, 10, "x")) != rows[:10]


def test_every_row_becomes_text_as_its_own_config_says(folder: Path) -> None:
    config = both(talks=2.0, max_seq_len=32)
    rows = read(config, folder)
    assert Counter(row.source for row in rows if isinstance(row, MixedRow)) == {"tones": 20, "talks": 20}
    tokenizer = load(folder)
    made = build(rows, config.pre_process_data_config, tokenizer)
    alone = [
        build(
            read(part, folder),
            part.pre_process_data_config.model_copy(update={"strategy": "pack"}),
            tokenizer,
        )
        for part in config.members
    ]
    assert made.trained_tokens == alone[0].trained_tokens + 2 * alone[1].trained_tokens
    assert made.tokens == alone[0].tokens + 2 * alone[1].tokens
    learnt = tokenizer.decode([n for block in made for n in block.labels if n >= 0])
    assert learnt.count(" joy") == 20
    assert learnt.count("yes 3<|end|>") == 2
    assert "phrase" not in learnt
    assert "ask" not in learnt


def test_the_plan_shows_the_parts(folder: Path) -> None:
    found = preview(both(tones=0.5), folder, folder)
    assert {part.name: (part.rows, part.format, part.train_on) for part in found.parts} == {
        "tones": (10, "", "completion"),
        "talks": (10, "prompt-completion", "assistant"),
    }
    assert found.rows == 20
    shown = "\n".join(console._preview(found))
    assert "tones, 10 rows, text" in shown
    assert "talks, 10 rows, prompt-completion" in shown


def test_a_row_drawn_twice_is_on_one_side_of_a_split(folder: Path) -> None:
    config = both(tones=3.0, talks=2.0)
    rows = read(config, folder)
    train, held_out = split_rows(rows, 0.3, 1, config.pre_process_data_config)
    assert train
    assert held_out
    assert not {json.dumps(row) for row in train} & {json.dumps(row) for row in held_out}
    assert all(isinstance(row, MixedRow) for row in held_out)


def test_a_mix_may_be_part_of_a_mix(folder: Path) -> None:
    inner = mix_config({"name": "tones", "weight": 2.0}, name="inner")
    outer = mix_config({"name": "inner"}, {"name": "talks"}, name="outer")
    config = workflow(TONES, TALKS, inner, outer).data_config("outer")
    assert Counter(row.source for row in read(config, folder)) == {"tones": 40, "talks": 10}  # type: ignore[attr-defined]
    assert len(preview(config, folder, folder).parts) == 2


def test_faults_name_the_row_of_the_part(folder: Path) -> None:
    (folder / "tones.json").write_text(
        json.dumps([{"phrase": "a", "tone": "joy"}, {"phrase": "b", "tone": None}])
    )
    with pytest.raises(ConfigError, match=r"tones row 1: column 'tone' is null"):
        preview(both(), folder, folder)
    (folder / "talks.json").write_text(json.dumps([{"phrase": "a"}]))
    with pytest.raises(ConfigError, match="text_cols names 'text'"):
        preview(both(), folder, folder)


def test_what_identifies_a_mix(folder: Path) -> None:
    first = data_digest(both(), folder)
    assert first == data_digest(both(strategy="join"), folder)
    changed = {**TONES, "pre_process_data_config": {"text_template": "{tone} {phrase}"}}
    parts = ({"name": "tones"}, {"name": "talks"})
    others = [
        data_digest(both(talks=2.0), folder),
        data_digest(workflow(changed, TALKS, mix_config(*parts)).data_config("mix"), folder),
        data_digest(workflow(TONES, TALKS, mix_config(*reversed(parts))).data_config("mix"), folder),
    ]
    assert len({first, *others}) == 4
    (folder / "talks.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    assert data_digest(both(), folder) != first


def test_a_part_on_a_hub_is_left_to_the_run(folder: Path) -> None:
    hub = {"name": "talks", "load_dataset_config": {"data_name": "some/hub"}}
    config = workflow(TONES, hub, mix_config({"name": "tones"}, {"name": "talks"})).data_config("mix")
    assert not is_local(config, folder)
    assert any("some/hub" in problem.message for problem in preview(config, folder, folder).problems)


def test_a_mix_that_was_never_linked(folder: Path) -> None:
    alone = DataConfig.model_validate(mix_config({"name": "tones"}))
    with pytest.raises(ConfigError, match="does not know its data configs: tones"):
        read(alone, folder)


def test_max_rows_takes_the_same_random_rows_in_order(folder: Path) -> None:
    config = DataConfig.model_validate(file_config("tones", max_rows=5))
    rows = read(config, folder)
    assert rows == read(config, folder)
    numbers = [int(row["phrase"].split()[1]) for row in rows]
    assert len(numbers) == 5
    assert numbers == sorted(numbers) != list(range(5))
    every = DataConfig.model_validate(file_config("tones", max_rows=50))
    assert len(read(every, folder)) == 20
    assert data_digest(config, folder) != data_digest(every, folder)
    pre = {"text_template": "{phrase}{tone}", "strategy": "pack"}
    found = preview(DataConfig.model_validate(file_config("tones", pre, max_rows=5)), folder, folder)
    assert (found.rows, found.max_rows) == (5, 5)
    assert "random choice" in "\n".join(console._preview(found))
