"""Keep secrets out of everything that is written or printed."""

from __future__ import annotations

import math
import re
from typing import Any

from olive.engine.result import RunResult

HIDDEN = "[redacted]"
_KEY = re.compile(
    r"(^|[_\-.])((api|access|account|private|shared|subscription)[_\-]?key|apikey|token|secret|password|passwd|"
    r"passphrase|credentials?|connection[_\-]?string|client[_\-]?secret|sas)$",
    re.IGNORECASE,
)
_TEXT_TOKENS = re.compile(
    r"(^|_)(eos|bos|pad|unk|sep|cls|mask|image|stop|start|end|special|first|next|per)_token$", re.IGNORECASE
)
_REFERENCE = re.compile(r"^(\$\{?\w+\}?|env:\w+|keyvault:\S+|[A-Z][A-Z0-9]*(_[A-Z0-9]+)+)$")
_SWITCHES = ("", "true", "false", "null", "none", "0", "1")
_VALUE = re.compile(
    r"\bhf_(?:[A-Za-z0-9]{16,}|(?=[A-Za-z]*\d)[A-Za-z0-9]{6,})"
    r"|\b(?:ghp|gho|ghs|ghu|ghr)_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w\-]{16,}"
    r"|\bsk-[A-Za-z0-9_\-]{16,}|\bAKIA[A-Z0-9]{16}\b|\bxox[abprs]-[\w\-]{10,}"
    r"|\beyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]*"
    r"|(?<=AccountKey=)[^;\s\"']+|(?<=SharedAccessSignature=)[^;\s\"']+|(?<=[?&]sig=)[^&\s\"']+"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_ASSIGNED = re.compile(
    r"(?i)\b(\w*(?:password|secret|api_key|auth_token|access_token|hf_token))(\"?\s*[=:]\s*\"?)([^\s\"',;]+)"
)


def text(value: str) -> str:
    """``value`` with everything that looks like a secret blanked out."""
    value = _VALUE.sub(HIDDEN, value)
    return _ASSIGNED.sub(_assigned, value)


def _assigned(match: re.Match[str]) -> str:
    if match[3].lower() in _SWITCHES or _REFERENCE.match(match[3]) or HIDDEN in match[3]:
        return match[0]
    return f"{match[1]}{match[2]}{HIDDEN}"


def tree(value: Any, key: str = "") -> Any:
    """A JSON tree with secrets blanked out, by the name of the key or the look of the value.

    References (``$HF_TOKEN``, ``env:NAME``) and switches (``hf_token: true``) stay. Numbers that JSON cannot
    write (NaN, infinity) become null.
    """
    if isinstance(value, dict):
        return {name: tree(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tree(item, key) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str):
        return value
    if (
        value.lower() not in _SWITCHES
        and _KEY.search(key)
        and not _TEXT_TOKENS.search(key)
        and not _REFERENCE.match(value)
    ):
        return HIDDEN
    return text(value)


def document(result: RunResult) -> dict[str, Any]:
    """The JSON of a run, without secrets; relative to the folder that holds it."""
    dumped: dict[str, Any] = tree(result.model_dump(mode="json"))
    dumped["output_dir"] = "."
    return dumped


def result(value: RunResult) -> RunResult:
    """``value`` with secrets blanked out of everything a report shows."""
    return value.model_copy(
        update={
            "document": tree(value.document),
            "machine": tree(value.machine),
            "findings": tuple(type(item)(**tree(item.model_dump())) for item in value.findings),
            "steps": tuple(
                step.model_copy(
                    update={
                        "facts": tree(step.facts),
                        "gates": tuple(g.model_copy(update={"text": text(g.text)}) for g in step.gates),
                    }
                )
                for step in value.steps
            ),
            "prompt_template": text(value.prompt_template)
            if value.prompt_template
            else value.prompt_template,
            "sample": tree(value.sample),
        }
    )
