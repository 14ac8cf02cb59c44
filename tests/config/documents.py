"""The documents of the tests and small stand-ins for the passes they name."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import Field

from olive.config.base import Dtype, PassParams
from olive.config.loader import Loaded, load


class LoRA(PassParams):
    r: int = Field(64, ge=1)
    alpha: float = 16
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    torch_dtype: Dtype | None = None
    train_data_config: str = Field(json_schema_extra={"reference": "data_configs"})
    eval_data_config: str | None = Field(None, json_schema_extra={"reference": "data_configs"})
    eval_dataset_size: float | int | None = Field(None, gt=0)
    training_args: dict[str, Any] = Field(default_factory=dict)


class MergeAdapterWeights(PassParams):
    dtype: Dtype | None = None


class ModelBuilder(PassParams):
    precision: Literal["fp32", "fp16", "int4", "int8"]
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    extra_options: dict[str, Any] = Field(default_factory=dict)


PASSES: dict[str, type[PassParams]] = {
    "LoRA": LoRA,
    "MergeAdapterWeights": MergeAdapterWeights,
    "ModelBuilder": ModelBuilder,
}

TEMPLATE = "### Text: {phrase}\n### The tone is:\n{tone}"
CHAT = "<|user|>\n{phrase}<|end|>\n<|assistant|>\n{tone}<|end|>"

DOCUMENT_A: dict[str, Any] = {
    "input_model": {
        "type": "PyTorchModel",
        "config": {
            "hf_config": {
                "model_name": "model-cache/microsoft/phi-3-mini",
                "task": "text-generation",
                "model_loading_args": {"trust_remote_code": True},
            }
        },
    },
    "data_configs": [
        {
            "name": "dataset_default_train",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {
                "params": {
                    "data_name": "json",
                    "data_files": "dataset/dataset-classification.json",
                    "split": "train",
                }
            },
            "pre_process_data_config": {
                "params": {
                    "dataset_type": "corpus",
                    "text_cols": ["phrase", "tone"],
                    "text_template": TEMPLATE,
                    "corpus_strategy": "join",
                    "source_max_len": 2048,
                    "pad_to_max_len": False,
                    "use_attention_mask": False,
                }
            },
        }
    ],
    "systems": {"local_system": {"type": "LocalSystem", "config": {"accelerators": ["cpu"]}}},
    "passes": {
        "lora": {
            "type": "LoRA",
            "config": {
                "target_modules": ["o_proj", "qkv_proj"],
                "double_quant": True,
                "lora_r": 64,
                "lora_alpha": 64,
                "lora_dropout": 0.1,
                "train_data_config": "dataset_default_train",
                "eval_dataset_size": 0.3,
                "training_args": {
                    "seed": 0,
                    "data_seed": 42,
                    "per_device_train_batch_size": 1,
                    "per_device_eval_batch_size": 1,
                    "gradient_accumulation_steps": 4,
                    "gradient_checkpointing": False,
                    "learning_rate": 0.0001,
                    "num_train_epochs": 3,
                    "max_steps": 10,
                    "logging_steps": 10,
                    "evaluation_strategy": "steps",
                    "eval_steps": 187,
                    "group_by_length": True,
                    "adam_beta2": 0.999,
                    "max_grad_norm": 0.3,
                },
            },
        },
        "merge_adapter_weights": {"type": "MergeAdapterWeights"},
        "builder": {"type": "ModelBuilder", "config": {"precision": "int4"}},
    },
    "engine": {
        "log_severity_level": 0,
        "host": "local_system",
        "target": "local_system",
        "search_strategy": False,
        "execution_providers": ["CPUExecutionProvider"],
        "cache_dir": "../model-cache/models/phi3-finetuned/cache",
        "output_dir": "../model-cache/models/phi3-finetuned",
    },
}


def document_b() -> dict[str, Any]:
    """A's siblings: params_config, component_kwargs, from_pretrained_args, a dict of data configs, a GPU."""
    found = copy.deepcopy(DOCUMENT_A)
    hf = found["input_model"]["config"]["hf_config"]
    hf["from_pretrained_args"] = hf.pop("model_loading_args")
    config = found["data_configs"][0]
    pre = config["pre_process_data_config"]["params"] | {"text_template": CHAT}
    found["data_configs"] = {
        "dataset_default_train": {
            "name": "dataset_default_train",
            "type": "HuggingfaceContainer",
            "params_config": {
                **config["load_dataset_config"]["params"],
                "component_kwargs": {"pre_process_data": pre},
            },
        }
    }
    found["systems"]["local_system"]["config"]["accelerators"] = [
        {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}
    ]
    del found["engine"]["execution_providers"]
    return found


DOCUMENT_C: dict[str, Any] = {
    "input_model": {
        "type": "HfModel",
        "model_path": "model-cache/microsoft/phi-3-mini",
        "load_kwargs": {"trust_remote_code": True},
    },
    "systems": {
        "local_system": {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
    },
    "data_configs": [
        {
            "name": "train",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": "dataset/a.json", "split": "train"},
            "pre_process_data_config": {
                "text_cols": ["phrase", "tone"],
                "text_template": TEMPLATE,
                "strategy": "join",
                "max_seq_len": 2048,
            },
        }
    ],
    "evaluators": {
        "tone": {
            "metrics": [
                {
                    "name": "tone",
                    "type": "accuracy",
                    "data_config": "train",
                    "sub_types": [
                        {
                            "name": "exact_match",
                            "priority": 1,
                            "goal": {"type": "threshold", "value": 0.9},
                        }
                    ],
                }
            ]
        }
    },
    "passes": {
        "lora": {
            "type": "LoRA",
            "target_modules": ["o_proj", "qkv_proj"],
            "r": 64,
            "alpha": 64,
            "lora_dropout": 0.1,
            "train_data_config": "train",
            "eval_dataset_size": 0.3,
            "training_args": {"seed": 0, "learning_rate": 0.0001, "max_steps": 10, "eval_strategy": "no"},
        },
        "merge": {"type": "MergeAdapterWeights"},
        "builder": {"type": "ModelBuilder", "precision": "int4", "evaluator": "tone"},
    },
    "host": "local_system",
    "target": "local_system",
    "evaluator": "tone",
    "search_strategy": False,
    "gates": {"parity": {"prompts": 4}},
    "cache_dir": "cache",
    "output_dir": "out",
    "log_severity_level": 0,
}


def load_document(source: Any) -> Loaded:
    return load(source, params_of=lambda name: PASSES[name], pass_names=tuple(PASSES))
