from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENT_A, DOCUMENT_C, document_b, load_document

from olive.config.loader import Loaded, dumps, rewrites
from olive.config.workflow import OnnxModel
from olive.errors import ConfigError, Problem, Severity


def said(loaded: Loaded, severity: Severity = Severity.NOTE) -> list[str]:
    return [problem.message for problem in loaded.findings if problem.severity is severity]


def refused(document: Any) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        load_document(document)
    return caught.value.problems


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(document)
    *parents, last = path.split("/")
    node: Any = found
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value
    return found


DOCUMENTS = {"A": DOCUMENT_A, "B": document_b(), "C": DOCUMENT_C}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_migrated_document_is_the_same_workflow(name: str, form: Any, tmp_path: Path) -> None:
    original = tmp_path / f"original.{form}"
    original.write_text(dumps(DOCUMENTS[name], form), encoding="utf-8")
    loaded = load_document(original)
    migrated = tmp_path / f"migrated.{form}"
    migrated.write_text(dumps(loaded.document, form), encoding="utf-8")
    again = load_document(migrated)
    assert again.workflow == loaded.workflow
    assert again.document == loaded.document
    assert rewrites(again) == ()
    assert loaded.path == original
    assert loaded.base_dir == Path.cwd()


def test_a_in_detail() -> None:
    workflow = load_document(DOCUMENT_A).workflow
    assert workflow.input_model.model_path == "model-cache/microsoft/phi-3-mini"
    assert workflow.input_model.load_kwargs.trust_remote_code is True
    assert list(workflow.passes) == ["lora", "merge_adapter_weights", "builder"]
    lora = workflow.passes["lora"].params.model_dump()
    assert (lora["r"], lora["alpha"], lora["lora_dropout"]) == (64, 64, 0.1)
    assert lora["target_modules"] == ("o_proj", "qkv_proj")
    assert lora["training_args"]["eval_strategy"] == "steps"
    assert lora["training_args"]["train_sampling_strategy"] == "group_by_length"
    assert lora["training_args"]["lr_scheduler_type"] == "constant"  # Olive 0.6's default
    data = workflow.data_config("dataset_default_train")
    assert data.load_dataset_config.data_files == "dataset/dataset-classification.json"
    assert data.load_dataset_config.split == "train"
    pre = data.pre_process_data_config
    assert (pre.strategy, pre.max_seq_len, pre.joiner) == ("join", 2048, "")
    assert workflow.systems["local_system"].accelerators[0].execution_providers == ("CPUExecutionProvider",)
    assert workflow.output_dir == "../model-cache/models/phi3-finetuned"
    assert workflow.log_severity_level == 0


def test_each_rewrite_of_a_is_told_once_in_words() -> None:
    loaded = load_document(DOCUMENT_A)
    notes = said(loaded)
    for expected in (
        "`lora_r` is now `r`",
        "`lora_alpha` is now `alpha`",
        "`model_loading_args` is now `load_kwargs`",
        "`corpus_strategy` is now `strategy`",
        "`source_max_len` is now `max_seq_len`",
        "`evaluation_strategy` is now `eval_strategy`",
        "`PyTorchModel` is now `HfModel`",
    ):
        assert notes.count(expected) == 1
    for word in (
        "double_quant",
        "dataset_type",
        "group_by_length",
        "execution_providers",
        "hf_config",
        "engine",
    ):
        assert sum(f"`{word}`" in note for note in notes) == 1, word
    assert any("max_steps" in warning for warning in said(loaded, Severity.WARNING))
    assert any("evaluation would never happen" in warning for warning in said(loaded, Severity.WARNING))
    assert len(said(loaded, Severity.WARNING)) == 2


def test_positions_of_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(DOCUMENT_A, indent=1), encoding="utf-8")
    note = next(problem for problem in load_document(path).findings if "lora_r" in problem.message)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if '"lora_r"' in text)
    assert note.where == f"{path}:{line}: $.passes.lora.config.lora_r"


def test_b_is_a_with_another_device() -> None:
    workflow = load_document(document_b()).workflow
    assert workflow.systems["local_system"].accelerators[0].device == "gpu"
    assert workflow.input_model == load_document(DOCUMENT_A).workflow.input_model
    pre = workflow.data_configs[0].pre_process_data_config
    assert pre.text_template is not None
    assert pre.text_template.startswith("<|user|>")
    assert pre.strategy == "join"


def test_c_needs_no_rewrite() -> None:
    loaded = load_document(DOCUMENT_C)
    assert loaded.findings == ()
    assert loaded.document == DOCUMENT_C


def test_old_defaults_are_written_out() -> None:
    document = copy.deepcopy(DOCUMENT_A)
    config = document["passes"]["lora"]["config"]
    for key in ("lora_dropout", "lora_alpha", "training_args"):
        del config[key]
    pre = document["data_configs"][0]["pre_process_data_config"]["params"]
    del pre["corpus_strategy"]
    loaded = load_document(document)
    params = loaded.workflow.passes["lora"].params.model_dump()
    assert (params["r"], params["alpha"], params["lora_dropout"]) == (64, 16, 0.0)
    assert params["training_args"] == {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "learning_rate": 0.0002,
        "lr_scheduler_type": "constant",
        "max_steps": 10000,
    }
    assert loaded.workflow.data_configs[0].pre_process_data_config.strategy == "line-by-line"
    assert any("line-by-line" in note for note in said(loaded))
    again = load_document(loaded.document)
    assert again.workflow == loaded.workflow


def test_new_defaults_hold_in_the_new_spelling() -> None:
    document = copy.deepcopy(DOCUMENT_C)
    del document["passes"]["lora"]["lora_dropout"]
    del document["data_configs"][0]["pre_process_data_config"]["strategy"]
    workflow = load_document(document).workflow
    assert workflow.passes["lora"].params.model_dump()["lora_dropout"] == 0.05
    assert workflow.data_configs[0].pre_process_data_config.strategy == "join"
    assert workflow.data_configs[0].pre_process_data_config.joiner == "\n\n"


@pytest.mark.parametrize(
    ("document", "path", "value", "where", "text"),
    [
        (DOCUMENT_A, "passes/lora/config/lora_rr", 1, "$.passes.lora.config.lora_rr", "did you mean `lora"),
        (DOCUMENT_A, "passes/lora/type", "LoRa", None, None),
        (DOCUMENT_A, "passes/lora/type", "Lora2", "$.passes.lora.type", "did you mean `LoRA`"),
        (DOCUMENT_A, "passes/builder/config/precision", "int5", "$.passes.builder.config.precision", "int"),
        (DOCUMENT_A, "engine/host", "locl_system", "$.engine.host", "did you mean `local_system`"),
        (DOCUMENT_A, "passes/lora/config/train_data_config", "nope", "$.passes.lora.config.train_data_config",
         "there are: dataset_default_train"),
        (DOCUMENT_A, "engine/search_strategy", {"execution_order": "joint"}, None, "order given"),
        (DOCUMENT_A, "engine/search_strategy", True, "$.engine.search_strategy", "order given"),
        (DOCUMENT_A, "passes/lora/config/training_args/learning_rat", 1, None, "`learning_rate`"),
        (DOCUMENT_A, "passes/lora/config/training_args/max_steps", "10", None, "without quotes"),
        (DOCUMENT_A, "passes/lora/config/training_args/learning_rate", 1e9, None, "out of range"),
        (DOCUMENT_A, "passes/lora/config/training_args/seed", 1.5, None, "a whole number"),
        (DOCUMENT_A, "passes/lora/config/training_args/optim", "adamw_torhc", None, "`adamw_torch`"),
        (DOCUMENT_A, "passes/lora/config/training_args/hub_token", "x", None, "secret"),
        (DOCUMENT_C, "passes/lora/learning_rate", 0.1, None, "move it into `training_args`"),
        (DOCUMENT_C, "passes/lora/r", "many", "$.passes.lora.r", "a whole number"),
        (DOCUMENT_C, "passes/lora/r", 0, "$.passes.lora.r", "greater than or equal to 1"),
        (DOCUMENT_C, "data_configs/0/load_dataset_config/data_files", 3,
         "$.data_configs[0].load_dataset_config.data_files", "text or a list or an object"),
        (DOCUMENT_C, "data_configs/0/pre_process_data_config/strategy", "joint", None, 'did you mean "join"'),
        (DOCUMENT_C, "systems/local_system/type", "AzureML", "$.systems.local_system.type", "LocalSystem"),
        (DOCUMENT_C, "input_model/type", "OpenVINOModel", "$.input_model.type", "Hugging Face"),
        (DOCUMENT_C, "evaluators/tone", {"type": "LMEvaluator", "tasks": ["x"]}, None, "LMEvaluator"),
        (DOCUMENT_C, "packaging_config", {"type": "Zipfile"}, "$.packaging_config", "not supported"),
        (DOCUMENT_C, "data_configs/0/name", "bad name", "$.data_configs[0].name", "letters"),
        (DOCUMENT_C, "passes", [], "$.passes", "object"),
        (DOCUMENT_C, "passes/merge", 3, "$.passes.merge", "object"),
        (DOCUMENT_C, "passes/merge", {}, "$.passes.merge", "`type` is missing"),
        (DOCUMENT_C, "passes/merge", {"tpye": "MergeAdapterWeights"}, "$.passes.merge.tpye", "mean `type`"),
        (DOCUMENT_C, "output_dir", "cache/", "$.cache_dir", "same folder"),
    ],
)  # fmt: skip
def test_one_problem_with_place_and_fix(
    document: dict[str, Any], path: str, value: Any, where: str | None, text: str | None
) -> None:
    if text is None:
        load_document(changed(document, path, value))
        return
    errors = [
        problem for problem in refused(changed(document, path, value)) if problem.severity is Severity.ERROR
    ]
    assert len(errors) == 1, errors
    assert text in str(errors[0])
    if where is not None:
        assert errors[0].where == where


def test_every_cause_is_reported_at_once() -> None:
    document = changed(DOCUMENT_A, "passes/lora/config/lora_rr", 1)
    document["engine"]["hots"] = "x"
    document["passes"]["builder"]["config"]["precision"] = "int3"
    document["data_configs"][0]["pre_process_data_config"]["params"]["text_templat"] = "x"
    assert len(refused(document)) == 4


def test_both_spellings_of_one_setting() -> None:
    document = changed(DOCUMENT_A, "passes/lora/config/r", 8)
    (problem,) = refused(document)
    assert "both are given" in problem.message
    document["passes"]["lora"]["config"]["r"] = 64
    load_document(document)


def test_harmless_keys_of_olive_get_a_note() -> None:
    document = DOCUMENT_C | {
        "workflow_id": "x",
        "clean_cache": True,
        "log_to_file": False,
        "plot_pareto_frontier": False,
        "ort_log_severity_level": 3,
        "evaluator": None,
        "host": None,
    }
    loaded = load_document(document)
    for key in (
        "workflow_id",
        "clean_cache",
        "log_to_file",
        "plot_pareto_frontier",
        "ort_log_severity_level",
    ):
        assert any(f"`{key}`" in note for note in said(loaded))
        assert key not in loaded.document
    assert loaded.workflow.evaluator is None
    assert load_document(loaded.document).workflow == loaded.workflow


def test_inline_objects_become_named() -> None:
    document = copy.deepcopy(DOCUMENT_C)
    document["passes"]["lora"]["train_data_config"] = document["data_configs"].pop()
    document["evaluator"] = document.pop("evaluators")["tone"]
    del document["passes"]["builder"]["evaluator"]
    document["evaluator"]["metrics"][0]["data_config"] = copy.deepcopy(
        document["passes"]["lora"]["train_data_config"]
    )
    document["host"] = document["systems"].pop("local_system")
    del document["systems"], document["target"]
    loaded = load_document(document)
    assert loaded.workflow.host == "host_system"
    assert loaded.workflow.target == "host_system"
    assert loaded.workflow.evaluator == "evaluator"
    assert {config.name for config in loaded.workflow.data_configs} >= {
        loaded.document["passes"]["lora"]["train_data_config"]
    }
    again = load_document(loaded.document)
    assert again.workflow == loaded.workflow
    assert again.document == loaded.document


def test_evaluator_of_olive() -> None:
    metric = {
        "name": "lat",
        "type": "Latency",
        "backend": "torch_metrics",
        "user_config": {"batch_size": 1},
        "sub_types": [
            {"name": "avg", "priority": 1, "metric_config": {"warmup_num": 3, "repeat_test_num": 7}}
        ],
    }
    document = changed(DOCUMENT_C, "evaluators/tone/metrics/0", metric)
    loaded = load_document(document)
    found = loaded.workflow.evaluators["tone"].metrics[0]
    assert (found.type, found.warmup, found.repeat, found.batch_size) == ("latency", 3, 7, 1)
    assert load_document(loaded.document).workflow == loaded.workflow


@pytest.mark.parametrize(
    ("accelerators", "device"),
    [
        (["GPU"], "gpu"),
        ([{"execution_providers": ["cudaexecutionprovider"]}], "gpu"),
        ([{"device": "cpu"}], "cpu"),
    ],
)
def test_accelerators(accelerators: Any, device: str) -> None:
    loaded = load_document(changed(DOCUMENT_C, "systems/local_system/accelerators", accelerators))
    assert loaded.workflow.systems["local_system"].accelerators[0].device == device


def test_host_follows_from_the_systems() -> None:
    document = copy.deepcopy(DOCUMENT_C)
    document["systems"] = {"gpu": {"type": "localsystem", "accelerators": [{"device": "gpu"}]}}
    del document["host"], document["target"]
    loaded = load_document(document)
    assert (loaded.workflow.host, loaded.workflow.target) == ("gpu", "gpu")
    again = load_document(loaded.document)
    assert again.workflow == loaded.workflow
    assert rewrites(again) == ()


def test_engine_providers_without_systems() -> None:
    document = copy.deepcopy(DOCUMENT_C)
    del document["systems"]
    document["engine"] = {"execution_providers": ["CUDAExecutionProvider"]}
    workflow = load_document(document).workflow
    assert workflow.systems["local_system"].accelerators[0].device == "gpu"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("strategy", "join-sliding-window", "needs `stride`"),
        ("strategy", "join-random", "needs `max_samples`"),
        ("stride", 4096, "beyond `max_seq_len`"),
    ],
)
def test_data_contradictions(key: str, value: Any, text: str) -> None:
    (problem,) = refused(changed(DOCUMENT_C, f"data_configs/0/pre_process_data_config/{key}", value))
    assert text in problem.message


def test_pad_to_max_len_is_noted() -> None:
    loaded = load_document(changed(DOCUMENT_C, "data_configs/0/pre_process_data_config/pad_to_max_len", True))
    assert any("pad_to_max_len" in note for note in said(loaded))


@pytest.mark.parametrize("name", ["missing.json", "folder", "latin.json", "empty.json", "empty.yaml"])
def test_unreadable_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "missng.json").write_text("{}")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(ConfigError) as caught:
        load_document(tmp_path / name)
    if name == "missing.json":
        assert "missng.json" in str(caught.value)


def test_search_values_in_a_pass() -> None:
    (problem,) = refused(changed(DOCUMENT_C, "passes/lora/r", "SEARCHABLE_VALUES"))
    assert "searched" in problem.message
    loaded = load_document(changed(DOCUMENT_C, "passes/lora/r", "DEFAULT_VALUE"))
    assert "r" not in loaded.document["passes"]["lora"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "alpaca", "text_template": "{a}{b}"}, "both `format` and `text_template`"),
        ({"train_on": "assistant", "text_template": "{a}{b}"}, "`train_on: assistant` needs chat turns"),
        ({"format": "chatml"}, '"chatml" is none of auto, messages, sharegpt, alpaca, prompt-completion'),
    ],
)
def test_a_format_that_contradicts(settings: dict[str, Any], message: str) -> None:
    document = changed(DOCUMENT_C, "data_configs/0/pre_process_data_config", settings)
    assert any(problem.message.startswith(message) for problem in refused(document))


def test_a_format_needs_no_template() -> None:
    for settings in ({"format": "auto", "train_on": "completion"}, {"train_on": "assistant"}, {}):
        loaded = load_document(changed(DOCUMENT_C, "data_configs/0/pre_process_data_config", settings))
        pre = loaded.workflow.data_configs[0].pre_process_data_config
        assert (pre.format, pre.train_on) == (settings.get("format"), settings.get("train_on"))


def mixing(*parts: dict[str, Any], **settings: Any) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT_C)
    document["data_configs"].append({"name": "both", "mix": list(parts), **settings})
    return document


def test_a_mix_names_other_data_configs() -> None:
    first = DOCUMENT_C["data_configs"][0]["name"]
    loaded = load_document(mixing({"name": first, "weight": 2}))
    config = loaded.workflow.data_config("both")
    assert [(part.name, part.weight) for part in config.mix] == [(first, 2.0)]
    assert config.members == (loaded.workflow.data_config(first),)
    assert loaded.document["data_configs"][-1] == {"name": "both", "mix": [{"name": first, "weight": 2}]}
    wrong = refused(mixing({"name": first + "x"}))
    assert [problem.message for problem in wrong] == [f'no data config is called "{first}x"']
    assert wrong[0].fix == f"did you mean `{first}`?"
    assert "both.mix" not in str(wrong[0].where)
    assert "mix[0].name" in str(wrong[0].where)


def test_a_mix_of_itself_is_refused() -> None:
    document = mixing({"name": "other"})
    document["data_configs"].append({"name": "other", "mix": [{"name": "both"}]})
    assert [problem.message for problem in refused(document)] == [
        "the mix 'both' would have its rows from itself: both <- other <- both",
        "the mix 'other' would have its rows from itself: other <- both <- other",
    ]
    assert "both <- both" in refused(mixing({"name": "both"}))[0].message


def test_rows_come_from_one_place() -> None:
    first = DOCUMENT_C["data_configs"][0]["name"]
    load = {"data_name": "json", "data_files": "a.json"}
    assert (
        "remove `load_dataset_config`"
        in refused(mixing({"name": first}, load_dataset_config=load))[0].message
    )
    assert [problem.message for problem in refused(mixing())] == ["`load_dataset_config` is missing"]
    warned = load_document(mixing({"name": first}, pre_process_data_config={"text_template": "{a}"}))
    assert any("`text_template` of a mix has no effect" in text for text in said(warned, Severity.WARNING))


def test_an_onnx_model_has_settings_of_its_own() -> None:
    document = {"input_model": {"type": "ONNXModel", "model_path": "m.onnx", "task": "x", "load_kwargs": {}}}
    loaded = load_document(document)
    assert loaded.workflow.input_model == OnnxModel(model_path="m.onnx")
    assert "`task` of an OnnxModel has no effect" in said(loaded)
    document["input_model"] = {"type": "OnnxModel", "model_path": "m", "onnx_filename": "a.onnx"}
    (problem,) = (p for p in refused(document) if p.severity is Severity.ERROR)
    assert problem.where == "$.input_model.onnx_filename"
    assert "onnx_file_name" in str(problem.fix)
