"""Whether ONNX Runtime GenAI reads a model's text as training does: its own tokenizer and template engine.

Asked in a process of its own, beside other work: the library is native, and brings NumPy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from olive.errors import Problem, Severity

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SECONDS = 20
# What the library wants to know of a model before it opens the tokenizer beside it.
_CONFIG = {
    "model": {
        "type": "llama",
        "context_length": 1,
        "vocab_size": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "decoder": {"filename": "none.onnx"},
    },
    "search": {},
}


class Question:
    """A text that the runtime is reading meanwhile; leaving the ``with`` block ends the process.

    Args:
        folder: of the model; None asks nothing.
        text: what to tokenise.
        template: chat template of the model; None where the text is not rendered with it.
        turns: chat turns to render with the template and its generation prompt.
    """

    def __init__(
        self,
        folder: Path | None,
        text: str,
        template: str | None = None,
        turns: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._process: subprocess.Popen[str] | None = None
        if folder is None or not (folder / _FILES[0]).is_file() or find_spec("onnxruntime_genai") is None:
            return  # a tokenizer in an older form is converted by the export first
        asked = json.dumps(
            {"folder": str(folder.absolute()), "text": text, "template": template, "turns": list(turns)},
            default=str,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import answer; answer()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        assert self._process.stdin is not None  # noqa: S101 - PIPE
        with suppress(BrokenPipeError):
            self._process.stdin.write(asked + "\n")
            self._process.stdin.flush()

    def __enter__(self) -> Question:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def problems(self, ids: Sequence[int], prompt: str | None = None) -> list[Problem]:
        """What the runtime reads otherwise.

        Args:
            ids: the text's tokens as training has them, without those that are added around it.
            prompt: the turns as training renders them.
        """
        if self._process is None:
            return []
        try:
            said, _ = self._process.communicate(timeout=_SECONDS)
            found = json.loads(said)
        except (subprocess.TimeoutExpired, ValueError):
            return [_warning("ONNX Runtime GenAI gave no answer when asked to tokenise the first row")]
        if "refused" in found:
            return [_warning(f"ONNX Runtime GenAI does not read this tokenizer: {found['refused']}")]
        made = []
        if found["ids"] != list(ids):
            made.append(_difference(found["ids"], ids))
        if found.get("unrendered"):
            made.append(
                _warning(f"ONNX Runtime GenAI does not render this chat template: {found['unrendered']}")
            )
        elif prompt is not None and found.get("prompt") not in (None, prompt):
            made.append(
                Problem(
                    f"ONNX Runtime GenAI renders the chat template otherwise than training: "
                    f"{found['prompt'][-60:]!r} instead of {prompt[-60:]!r}",
                    fix="give a simpler template as chat_template, and use it in the application too",
                )
            )
        return made


def _difference(theirs: Sequence[int], ours: Sequence[int]) -> Problem:
    pairs = enumerate(zip(theirs, ours, strict=False))
    place = next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    return Problem(
        f"ONNX Runtime GenAI reads the first row otherwise than training: from token {place} on it has "
        f"{list(theirs[place : place + 4])}, training has {list(ours[place : place + 4])}",
        fix="what is learnt would not be what the device asks; use a model whose tokenizer.json is in a form "
        "the runtime knows (re-saved by a current transformers), or another template",
    )


def _warning(message: str) -> Problem:
    return Problem(message, severity=Severity.WARNING)


def answer() -> None:
    """In the process: read the question, print the answer."""
    import onnxruntime_genai as og

    asked = json.loads(sys.stdin.readline())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in _FILES:
            if (Path(asked["folder"]) / name).is_file():
                (Path(scratch) / name).symlink_to(Path(asked["folder"]) / name)
        (Path(scratch) / "genai_config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        try:
            tokenizer = og.Tokenizer(scratch)
            found["ids"] = [int(token) for token in tokenizer.encode(asked["text"])]
        except RuntimeError as error:
            found["refused"] = str(error)
        else:
            found |= _rendered(tokenizer, asked)
    json.dump(found, sys.stdout)


def _rendered(tokenizer: Any, asked: Mapping[str, Any]) -> dict[str, str]:
    if not asked["template"] or not asked["turns"]:
        return {}
    try:
        turns = json.dumps(asked["turns"])
        prompt = tokenizer.apply_chat_template(
            turns, template_str=asked["template"], add_generation_prompt=True
        )
    except RuntimeError as error:
        return {"unrendered": str(error)}
    return {"prompt": str(prompt)}
