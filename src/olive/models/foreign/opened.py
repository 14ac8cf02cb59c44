"""Which format a folder has, and its tensors in our layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olive.errors import ConfigError
from olive.models.foreign import bitsandbytes, compressed, gguf, gptq
from olive.models.foreign.view import ForeignTensors, View
from olive.models.quantised import METHOD, method_of
from olive.models.stream import LazyTensors
from olive.models.tensors import read_tensors

KNOWN = ("gptq", "awq", "compressed-tensors", "bitsandbytes")


def view_of(folder: Path, config: Mapping[str, Any]) -> View | None:
    """How a model folder is translated; None where it is in our layout or in floating point.

    Raises:
        ConfigError: a format, or a version of one, that is not read here.
    """
    if (file := gguf.file_in(folder)) is not None:
        return gguf.open_file(file)[1]
    method = method_of(config)
    if method is None or method == METHOD:
        return None
    stored = read_tensors(folder)
    try:
        if method in ("gptq", "awq"):
            return gptq.view(folder, config, stored)
        if method == "compressed-tensors":
            return compressed.view(config, stored)
        if method == "bitsandbytes":
            return bitsandbytes.view(folder, config, stored)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"quantization_config of {folder} is damaged: {error!r}", fix="Copy or download the model again."
        ) from error
    raise ConfigError(
        f"{folder} is stored quantised ({method}), a format that is not read here",
        where="input_model",
        fix=f"Use a model in one of {', '.join(KNOWN)}, {METHOD}, or in floating point.",
    )


def open_tensors(folder: Path, config: Mapping[str, Any]) -> tuple[LazyTensors, dict[str, Any]]:
    """The tensors of a model folder in floating point or in our layout, and its config in our terms.

    Args:
        folder: of the model.
        config: its config.json.

    Returns:
        The tensors, to be entered as a context, and the config, whose ``quantization_config`` is ours or
        missing.

    Raises:
        ConfigError: a format that is not read here, or a damaged one.
    """
    if (file := gguf.file_in(folder)) is not None:
        header, translated = gguf.open_file(file)
        return gguf.GgufTensors(file, header, translated), translated.config(config)
    view = view_of(folder, config)
    if view is None:
        return LazyTensors(folder), dict(config)
    return ForeignTensors(folder, view), view.config(config)
