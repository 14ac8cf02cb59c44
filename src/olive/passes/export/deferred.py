"""transformers' model classes, imported when the builder asks one for a model and not when it starts.

Importing the builder imports ten of them, and with them most of transformers and of torch's compiler: more
than the rest of an export of a small model takes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSpeechSeq2Seq", "Gemma3ForConditionalGeneration",
    "Lfm2VlForConditionalGeneration", "Mistral3ForConditionalGeneration", "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
)  # fmt: skip


class Deferred:
    """Stands for a class of transformers; its attributes are those of the class."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        import transformers

        return getattr(getattr(transformers, self._name), attribute)


@contextmanager
def models_deferred() -> Iterator[None]:
    """While the builder is imported, let it have stand-ins for the classes that are not imported yet."""
    import transformers

    given = [name for name in _CLASSES if name not in vars(transformers)]
    if "builders.base" in sys.modules:
        given = []
    for name in given:
        setattr(transformers, name, Deferred(name))
    try:
        yield
    finally:
        for name in given:
            if isinstance(vars(transformers).get(name), Deferred):
                delattr(transformers, name)
