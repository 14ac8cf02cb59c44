"""ONNX models: what they are, by their graph alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.models.artifact import Kind, ModelInfo
from olive.models.onnx_header import read_graph


def describe_bundle(folder: Path, config: Mapping[str, Any], chat_template: bool) -> ModelInfo:
    """A folder that onnxruntime-genai reads.

    Args:
        folder: holds ``genai_config.json``.
        config: what that file says.
        chat_template: whether the tokenizer brings one.
    """
    decoder = (config.get("model") or {}).get("decoder") or {}
    file = folder / str(decoder.get("filename"))
    graph = read_graph(file) if file.is_file() else None
    return ModelInfo(
        path=folder,
        kind=Kind.GENAI,
        config=dict(config),
        tensors={} if graph is None else graph.tensors,
        chat_template=chat_template,
        graph=graph,
    )


def describe_graph(folder: Path, file: str) -> ModelInfo:
    """A plain ONNX model.

    Raises:
        ConfigError: ``file`` is no ONNX model, or not whole.
        UntrustedInput: its weights lie outside of the folder.
    """
    graph = read_graph(folder / file)
    return ModelInfo(path=folder, kind=Kind.ONNX, config={}, tensors=graph.tensors, graph=graph)


def takes_tokens(model: ModelInfo) -> bool:
    """Whether a graph reads token ids, and its folder brings the tokenizer that makes them."""
    graph = model.graph
    reads = graph is not None and any(value.name == "input_ids" for value in graph.inputs)
    return reads and (model.path / "tokenizer.json").is_file()
