"""Versions that were tested together, and combinations that are known not to work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from olive.errors import Problem, Severity

# The content of constraints.txt, which a wheel does not carry; a test keeps both equal.
TESTED: dict[str, str] = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "bitsandbytes": "0.50.2",
    "onnx": "1.23.2",
    "onnx-ir": "1.1.0",
    "onnxscript": "0.7.2",
    "onnxruntime": "1.32.0",
    "onnxruntime-genai": "0.18.0",
    "gguf": "0.19.0",
    "compressed-tensors": "0.20.0",
    "optuna": "5.0.0",
    "pydantic": "2.14.3",
    "torchmetrics": "1.9.0",
    "tensorboard": "2.21.0",
    "mlflow-skinny": "3.17.2",
    "wandb": "0.31.0",
    "trl": "1.16.0",
}

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")

KNOWN: tuple[str, ...] = tuple(
    dict.fromkeys([*TESTED, "tokenizers", "huggingface-hub", "numpy", *_RUNTIMES, *_GENAI])
)


class _Needs(NamedTuple):
    """From ``since`` on, ``package`` needs one of ``others`` in at least version ``minimum``."""

    package: str
    since: str
    others: tuple[str, ...]
    minimum: str
    symptom: str


# The lower bounds that each package's own metadata states, for pairs that pip leaves broken after a later
# `pip install` of only one of them.
_NEEDS: tuple[_Needs, ...] = (
    *(_Needs(name, "0.18", _RUNTIMES, "1.31", "its native library does not load") for name in _GENAI),
    _Needs("transformers", "5.23", ("safetensors",), "0.8.0", "importing it fails"),
    _Needs("transformers", "5.23", ("tokenizers",), "0.23.1", "importing it fails"),
    _Needs("transformers", "5.23", ("huggingface-hub",), "1.31.0", "importing it fails"),
)


def version_tuple(version: str) -> tuple[int, ...]:
    """Release numbers of a version, without trailing zeros: ``2.13.0+cpu`` is ``(2, 13)``."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check(packages: Mapping[str, str]) -> Iterable[Problem]:
    """What is wrong with the installed versions: errors for what cannot work, notes for what was not tested.

    Args:
        packages: distribution -> installed version, as in ``Machine.packages``.
    """
    yield from _broken_pairs(packages)
    yield from _overwritten(packages, _RUNTIMES, "onnxruntime")
    yield from _overwritten(packages, _GENAI, "onnxruntime_genai")
    for name, tested in TESTED.items():
        found = packages.get(name)
        if found is not None and version_tuple(found) != version_tuple(tested):
            relation = "newer" if version_tuple(found) > version_tuple(tested) else "older"
            yield Problem(
                f"{name} {found} is {relation} than {tested}, the version this release was tested with",
                fix=f'only if something misbehaves: pip install "{name}=={tested}"',
                severity=Severity.NOTE,
                exit_code=5,
            )


def _broken_pairs(packages: Mapping[str, str]) -> Iterable[Problem]:
    for rule in _NEEDS:
        found = packages.get(rule.package)
        if found is None or version_tuple(found) < version_tuple(rule.since):
            continue
        present = {name: packages[name] for name in rule.others if name in packages}
        if any(version_tuple(version) >= version_tuple(rule.minimum) for version in present.values()):
            continue
        what = " and ".join(f"{name} {version}" for name, version in present.items()) or "none"
        wanted = next(iter(present), rule.others[0])
        yield Problem(
            f"{rule.package} {found} needs {wanted} >= {rule.minimum}, but {what} is here: {rule.symptom}",
            fix=f'pip install --upgrade "{wanted}>={rule.minimum}"',
            exit_code=5,
        )


def _overwritten(packages: Mapping[str, str], names: tuple[str, ...], module: str) -> Iterable[Problem]:
    present = [name for name in names if name in packages]
    if len(present) > 1:
        yield Problem(
            f"{' and '.join(present)} install the same module, {module}: the last one overwrote the others",
            fix=f"pip uninstall -y {' '.join(present)}, then install the one you need",
            severity=Severity.WARNING,
            exit_code=5,
        )
