"""Quantising passes in a document: older names, and calibration data taken from the fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest

from olive.config.loader import Loaded, load
from olive.errors import ConfigError
from olive.passes.registry import names, params_of

LORA = {"type": "LoRA", "train_data_config": "second"}


def loaded(passes: dict[str, Any]) -> Loaded:
    data = [
        {
            "name": name,
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": f"{name}.json", "split": "train"},
        }
        for name in ("first", "second")
    ]
    body = {"input_model": {"type": "HfModel", "model_path": "base"}, "data_configs": data, "passes": passes}
    return load(body, params_of=params_of, pass_names=names())


@pytest.mark.parametrize(
    ("passes", "wanted"),
    [
        ({"l": LORA, "q": {"type": "Gptq"}}, "second"),
        ({"l": LORA, "q": {"type": "Gptq", "data_config": "first"}}, "first"),
        ({"q": {"type": "Awq"}, "l": LORA}, None),
        ({"q": {"type": "Gptq"}}, None),
    ],
)
def test_calibration_data_is_the_fine_tuning_data_of_a_pass_before(
    passes: dict[str, Any], wanted: str | None
) -> None:
    assert loaded(passes).workflow.passes["q"].params.data_config == wanted


def test_older_names_and_what_they_meant() -> None:
    found = loaded(
        {
            "a": {"type": "GptqQuantizer", "bits": 4, "static_groups": True, "data_config": "first"},
            "b": {"type": "GptqModel", "group_size": 64, "data_config": "first"},
            "c": {
                "type": "AutoAWQQuantizer",
                "q_group_size": 16,
                "zero_point": False,
                "data_config": "first",
            },
        }
    )
    passes = found.workflow.passes
    assert [entry.type for entry in passes.values()] == ["Gptq", "Gptq", "Awq"]
    assert [entry.params.group_size for entry in passes.values()] == [128, 64, 16]
    assert [entry.params.sym for entry in passes.values()] == [False, False, True]
    said = " ".join(problem.message for problem in found.findings)
    for text in (
        "`GptqQuantizer` is now `Gptq`",
        "group_size 128",
        "`static_groups`",
        "`zero_point` is now `sym`",
    ):
        assert text in said


def graph_pass(**entry: Any) -> Any:
    body = {"input_model": {"type": "OnnxModel", "model_path": "m.onnx"}, "passes": {"q": entry}}
    return load(body, params_of=params_of, pass_names=names()).workflow.passes["q"]


def test_passes_of_older_documents_on_graphs() -> None:
    found = graph_pass(type="OnnxMatMul4Quantizer", algorithm="RTN", config={"is_symmetric": False})
    assert found.type == "OnnxBlockWiseRtnQuantization"
    assert (found.params.block_size, found.params.is_symmetric) == (32, False)
    assert graph_pass(type="OnnxMatMul4Quantizer", algorithm="HQQ").type == "OnnxHqqQuantization"
    with pytest.raises(ConfigError, match="GPTQ"):
        graph_pass(type="OnnxMatMul4Quantizer", algorithm="GPTQ")
    given = graph_pass(type="OnnxDynamicQuantization", precision="QUInt8")
    assert given.params.precision == "uint8"


def test_spinquant_of_an_olive_document() -> None:
    arguments = {"max_steps": 20, "learning_rate": 1.5, "per_device_train_batch_size": 4}
    entry = {"type": "SpinQuant", "rotate_mode": "random", "a_bits": 16, "training_args": arguments}
    found = loaded({"l": LORA, "r": entry})
    params = found.workflow.passes["r"].params
    assert (params.rotate_mode, params.iters, params.data_config) == ("random", 20, "second")
    said = " ".join(problem.message for problem in found.findings)
    for text in (
        "`learning_rate`",
        "`per_device_train_batch_size`",
        "`max_steps` is now `iters`",
        "`a_bits`",
    ):
        assert text in said
    with pytest.raises(ConfigError, match="activations of 8 bits"):
        loaded({"l": LORA, "r": entry | {"a_bits": 8}})
