"""The bundle gate: the folder loads and generates in a clean process, with the installed runtime alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from olive.config.gates import BundleGate
from olive.engine.gates import generate_once
from olive.engine.gates.compare import References, probes
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact
from olive.passes.base import PassContext

NEW_TOKENS = 8
_LINES = 12
_SECONDS, _BYTES_A_SECOND = 120.0, 20e6


def check(
    before: Artifact,
    after: Path,
    settings: BundleGate,
    ctx: PassContext,
    prompts: list[list[int]],
    known: References | None = None,
) -> GateResult:
    """Generate from ``after`` in a new interpreter.

    Also: no link of any kind in the folder (a moved or cleaned cache would break it), no absolute path in
    genai_config.json.

    Raises:
        PassFailed: the folder does not load or generate; the message has the end of what the program said.
    """
    vocabulary, context = _check_files(after)
    ids = probes(prompts, vocabulary, 1)[0][: max(1, context - NEW_TOKENS)]
    answer = _generate(after, ids)
    made = answer["ids"]
    if not made or not all(0 <= token < vocabulary for token in made):
        _fail(f"the model generated {made!r}", "Export again; if it stays, use another precision.")
    figures = {
        "tokens": float(len(made)),
        "load_seconds": answer["load_seconds"],
        "seconds": answer["seconds"],
        "bytes": float(_size(after)),
    }
    return GateResult(gate="bundle", passed=True, figures=figures, text=str(answer["text"]).strip())


def _fail(message: str, fix: str) -> NoReturn:
    raise PassFailed(f"bundle gate: {message}", where="ModelBuilder", fix=fix)


def _check_files(folder: Path) -> tuple[int, int]:
    """Vocabulary and context length; the folder is whole in itself."""
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink() or (path.is_file() and state.st_nlink > 1):
            _fail(f"{path.name} is a link", "The runtime refuses linked weights; write a copy.")
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        found = int(config["model"]["vocab_size"]), int(config["model"]["context_length"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        _fail(f"no readable genai_config.json: {type(error).__name__}: {error}", "Export again.")
    for text in _strings(config):
        if Path(text).is_absolute() or text.startswith("..") or str(folder) in text:
            _fail(f"genai_config.json names {text!r}, which leaves the folder", "Export again.")
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for child in children for text in _strings(child)]


def _generate(folder: Path, ids: list[int]) -> dict[str, Any]:
    limit = _SECONDS + _size(folder) / _BYTES_A_SECOND
    request = json.dumps({"folder": str(folder.resolve()), "ids": ids, "new_tokens": NEW_TOKENS})
    # -P keeps the program's own folder off the import path: its neighbours must not shadow a library.
    command = [sys.executable, "-P", str(Path(generate_once.__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="olive-bundle-") as empty:
        try:
            done = subprocess.run(
                command,
                input=request,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=limit,
                cwd=empty,
                env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            _fail(
                f"no answer within {limit:.0f} s from {error.cmd[-1]}",
                "Free memory or processors, then run again.",
            )
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        how = _signal(-done.returncode) if done.returncode < 0 else f"exit {done.returncode}"
        _fail(
            f"the folder does not load and generate in a clean process ({how}):\n{tail}",
            "Compare onnxruntime and onnxruntime-genai with the tested set (olive doctor).",
        )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        _fail(f"the program's answer is not readable: {error}: {done.stdout[-200:]!r}", "Run again.")
    return answer


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    return f"ended by signal {number}, {name}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
