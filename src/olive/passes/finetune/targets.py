"""Which layers of a model a document means, told from its headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from olive.errors import Problem
from olive.models.artifact import ModelInfo

Named = tuple[str, ...] | str | None
ALL = "all-linear"

# what PEFT, then Olive, adapt when the document does not say
_TARGETS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
} | dict.fromkeys(
    (
        "llama",
        "mistral",
        "mixtral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen2",
        "qwen3",
        "smollm3",
        "granite",
        "olmo2",
    ),
    ("q_proj", "v_proj"),
)
_HEADS = {"lm_head", "embed_out"}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def targets(config: Mapping[str, Any], named: Named, modules: Iterable[str]) -> list[str] | str:
    """Modules to adapt, as PEFT takes them: those named, else the architecture's custom, else nearly all.

    Args:
        config: the model's config.json.
        named: ``target_modules`` of the document.
        modules: last parts of the names of the model's linear layers.
    """
    if isinstance(named, str):
        return named
    if named is not None:
        return ALL if ALL in named else list(named)
    known = _TARGETS.get(str(config.get("model_type", "")))
    have = set(modules)
    if known and set(known) <= have:
        return list(known)
    return sorted(have - _HEADS)


def check_targets(
    model: ModelInfo, named: Named, layers: tuple[int, ...] | None, modules: Mapping[str, int]
) -> Iterator[Problem]:
    """What is wrong with the modules and layers that a document names."""
    have = ", ".join(f"{name} ({count})" for name, count in sorted(modules.items()))
    if isinstance(named, str) and named != ALL:
        yield from _check_pattern(model, named, have)
    elif named is None and not targets(model.config, None, modules):
        yield Problem("no linear layer to adapt was found", fix="name them in target_modules")
    for name in named if isinstance(named, tuple) else ():
        if name != ALL and name.rpartition(".")[2] not in modules:
            close = get_close_matches(name, list(modules), n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            yield Problem(
                f"the model has no module {name!r}", where="target_modules", fix=f"{hint}it has: {have}"
            )
    numbers = {int(found[1]) for name in model.tensors if (found := _LAYER.search(name))}
    if missing := sorted(set(layers or ()) - numbers):
        yield Problem(
            f"the model has no layer {', '.join(map(str, missing))}",
            where="layers_to_transform",
            fix=f"it has the layers 0 to {max(numbers)}" if numbers else "leave layers_to_transform out",
        )


def _check_pattern(model: ModelInfo, pattern: str, have: str) -> Iterator[Problem]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        yield Problem(
            f"{pattern!r} is no regular expression: {error}",
            where="target_modules",
            fix="Name modules in a list, or correct the expression.",
        )
        return
    if not any(compiled.fullmatch(name) for name, _ in linear_weights(model)):
        yield Problem(
            f"no linear layer's whole name matches {pattern!r}",
            where="target_modules",
            fix=f"Names read like {next(linear_weights(model), ('none', (0, 0)))[0]}; the ends are: {have}",
        )


def adapted(
    model: ModelInfo, named: Named, layers: tuple[int, ...] | None
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (out, in) of each linear layer that would be adapted."""
    every = dict(linear_weights(model))
    return ((name, every[name]) for name in chosen(model.config, named, layers, every))


def chosen(
    config: Mapping[str, Any], named: Named, layers: tuple[int, ...] | None, names: Iterable[str]
) -> list[str]:
    """Those of the linear layers called ``names`` that PEFT adapts."""
    names = list(names)
    wanted = targets(config, named, {name.rpartition(".")[2] for name in names})

    def meant(name: str) -> bool:
        if wanted == ALL:
            return name.rpartition(".")[2] not in _HEADS
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name) is not None
        return any(name == end or name.endswith(f".{end}") for end in wanted)

    def inside(name: str) -> bool:
        number = _LAYER.search(f"{name}.")
        return layers is None or (number is not None and int(number[1]) in layers)

    return [name for name in names if meant(name) and inside(name)]


def linear_weights(model: ModelInfo) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (out, in) of every layer whose weight is a matrix and that is no embedding, head included."""
    for name, (_, shape) in model.tensors.items():
        module = name.removesuffix(".weight")
        if name != module and len(shape) == 2 and "embed_tokens" not in module and "wte" not in module:
            yield module, (shape[0], shape[1])
