"""The labelled parts that a step's cache key is made of."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any

from olive.config.workflow import Accelerator, Evaluator, PassEntry, Workflow
from olive.data.digest import data_digest
from olive.hardware.machine import Machine
from olive.hardware.probe import installed, training_dtype
from olive.models.artifact import Artifact
from olive.passes.base import Pass
from olive.passes.registry import resolve

FORMAT = 1
_VARIANTS = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "onnxruntime-genai": ("onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
}


def step_parts(
    entry: PassEntry,
    model: Artifact,
    workflow: Workflow,
    *,
    accelerator: Accelerator,
    target: Accelerator,
    machine: Machine,
    base_dir: Path,
    memo: Path,
) -> dict[str, Any]:
    """Everything that may change what a step makes, by name.

    Raises:
        ConfigError: a data file is missing.
    """
    technique = resolve(entry.type)
    names = data_names(entry)
    return {
        "format": FORMAT,
        "pass": technique.__name__,
        "source": {"pass": _source(technique)}
        | {room: _folder_source(f"olive.{room}") for room in ("models", "quantization")}
        | ({"data": _folder_source("olive.data")} if names else {}),
        "params": entry.params.model_dump(mode="json"),
        "model": model_part(model),
        "data": {name: data_part(workflow, name, base_dir, memo) for name in names},
        "libraries": {name: library_version(name, machine) for name in technique.libraries},
        "gates": {
            name: getattr(workflow.gates, name).model_dump(mode="json")
            for name in technique.gates_of(model.kind)
        },
        "hardware": _hardware_part(technique, accelerator, target, machine),
    }


def evaluation_parts(
    evaluator: Evaluator, model: Artifact, workflow: Workflow, machine: Machine, base_dir: Path, memo: Path
) -> dict[str, Any]:
    """Everything that may change what an evaluation measures, by name."""
    names = {metric.data_config for metric in evaluator.metrics if metric.data_config}
    return {
        "format": FORMAT,
        "source": {
            room: _folder_source(f"olive.{room}") for room in ("evaluation", "data", "models", "quantization")
        },
        "evaluator": evaluator.model_dump(mode="json"),
        "model": model_part(model),
        "data": {name: data_part(workflow, name, base_dir, memo) for name in sorted(names)},
        "libraries": {
            name: library_version(name, machine)
            for name in ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
        },
        "machine": [machine.cpu, machine.cores, *(gpu.name for gpu in machine.gpus)],
    }


def library_version(name: str, machine: Machine) -> str | None:
    """The installed version of a distribution, or of the build that stands in for it.

    A pass of a third party may declare distributions that this product does not know.
    """
    if (found := machine.packages.get(name) or installed(name)) is not None:
        return found
    variant = next((other for other in _VARIANTS.get(name, ()) if other in machine.packages), None)
    return variant and f"{variant} {machine.packages[variant]}"


def data_names(entry: PassEntry) -> tuple[str, ...]:
    """The data configs that a step names."""
    values = (
        getattr(entry.params, name) for name, to in entry.params.references().items() if to == "data_configs"
    )
    return tuple(sorted({value for value in values if value}))


def model_part(model: Artifact) -> dict[str, Any]:
    """A model by content; an adapter with its base."""
    return {"digest": model.digest, "base": model.base.digest if model.base else None}


def data_part(workflow: Workflow, name: str, base_dir: Path, memo: Path) -> dict[str, Any]:
    """A dataset by content and by what is done to it; where it lies does not matter."""
    config = workflow.data_config(name)
    return {
        "content": data_digest(config, base_dir, memo),
        "pre_process": config.pre_process_data_config.model_dump(mode="json"),
    }


def _hardware_part(
    technique: type[Pass[Any]], accelerator: Accelerator, target: Accelerator, machine: Machine
) -> dict[str, str]:
    values = {
        "device": accelerator.device,
        "training_dtype": training_dtype(machine, accelerator.device),
        "execution_provider": target.execution_provider,
    }
    return {name: values[name] for name in technique.hardware}


def _source(technique: type[Pass[Any]]) -> str:
    """Digest of the pass's own folder: the pass and the helpers beside it."""
    package = technique.__module__.rpartition(".")[0]
    if package:
        return _folder_source(package)
    return hashlib.sha256(inspect.getsource(sys.modules[technique.__module__]).encode()).hexdigest()


@cache
def _folder_source(package: str) -> str:
    spec = importlib.util.find_spec(package)
    roots = list(spec.submodule_search_locations or ()) if spec else []
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(Path(root).glob("**/*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
