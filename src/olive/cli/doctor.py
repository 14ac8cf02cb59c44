"""``olive doctor``: what this machine can do, what is missing, what does not fit together."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from olive.cli.arguments import Parser

_BRINGS = {
    "cpu": "fine-tuning, merging, export to ONNX and evaluation on a CPU",
    "gpu": "the same on an NVIDIA GPU",
    "directml": "running models on any GPU under Windows",
    "openvino": "running models on Intel devices",
    "azureml": "models, data and jobs of Azure ML",
    "ray": "steps on a Ray cluster",
    "dev": "the tests and checks of this project",
}
_REQUIRED = ("pydantic", "pyyaml", "rich", "psutil", "filelock", "jinja2", "tokenizers", "safetensors")
_CPU = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "torchmetrics", "onnx", "onnx-ir"),
    *("onnxruntime", "onnxruntime-genai"),
)
_LOADED = {"torch": "torch", "onnxruntime": "onnxruntime", "onnxruntime-genai": "onnxruntime_genai"}


def configure_doctor(parser: Parser) -> None:
    """What ``olive doctor`` takes."""
    parser.add_argument("--cache-dir", metavar="DIR", default=".olive-cache", help="where a cache would lie")


def doctor(args: argparse.Namespace) -> int:
    """Print the findings; exit code 5 where something required is broken."""
    required, extras = requirements()
    missing = [name for name in required if _installed(name) is None]
    if missing:  # without these, nothing below can be asked
        print(
            f"error: required and not installed: {', '.join(missing)}\n  fix pip install --upgrade olive-next"
        )
        return 5
    return _examine(args, extras)


def _examine(args: argparse.Namespace, extras: dict[str, tuple[str, ...]]) -> int:
    from olive.errors import Problem, Severity
    from olive.hardware.probe import probe
    from olive.hardware.tested import TESTED, check
    from olive.report.console import columns, problems

    machine = probe()
    own = _installed("olive-next") or "(not installed, run from its source)"
    print(f"olive-next {own}, Python {machine.python}\n")
    print("\n".join(_machine(Path(args.cache_dir))))
    wanted = {name for names in extras.values() for name in names}
    shown = [name for name in TESTED if _installed(name) or name in wanted]
    rows = [["package", "installed", "tested"]]
    rows += [[name, _installed(name) or "–", TESTED[name]] for name in shown]
    print("\nPackages", *columns(rows), sep="\n")
    print("\nExtras", *_extras(extras), sep="\n")
    found = list(check(machine.packages))
    broken = loads({name: module for name, module in _LOADED.items() if _installed(name)})
    found += [
        Problem(
            f"{name} {_installed(name)} does not load: {reason}",
            fix=f"pip install --force-reinstall {name}",
            exit_code=5,
        )
        for name, reason in broken.items()
    ]
    errors = [problem for problem in found if problem.severity is Severity.ERROR]
    print(
        "\nFindings",
        problems(found, indent="  ") or "  none: everything that is installed fits together",
        sep="\n",
    )
    if errors:
        return 5
    absent = [name for name in extras.get("cpu", ()) if _installed(name) is None]
    if absent:
        print("\nDocuments can be planned; to run them: pip install 'olive-next[cpu]'")
    else:
        print("\nReady to run documents.")
    return 0


def _machine(cache: Path) -> list[str]:
    from olive.hardware.probe import disk_free, probe, training_dtype
    from olive.report.console import labelled, relative
    from olive.report.figures import size

    machine = probe()
    lines = ["Machine", *labelled("cpu", f"{machine.cpu}, {machine.cores} cores usable")]
    lines += labelled("units", ", ".join(machine.cpu_features) or "none known")
    lines += labelled("memory", f"{size(machine.memory)}, {size(machine.memory_available)} available")
    lines += labelled("disk", f"{size(disk_free(cache))} free for {relative(cache)}")
    for gpu in machine.gpus:
        capability = ".".join(map(str, gpu.compute_capability)) if gpu.compute_capability else "unknown"
        lines += labelled("gpu", f"{gpu.name}, {size(gpu.memory)}, compute capability {capability}")
    if not machine.gpus:
        lines += labelled("gpu", "none with a working driver")
    dtypes = [f"{training_dtype(machine, 'cpu')} on the CPU"]
    dtypes += [f"{training_dtype(machine, 'gpu')} on the GPU"] if machine.gpus else []
    lines += labelled("trains in", ", ".join(dtypes))
    lines += labelled("runs on", ", ".join(machine.execution_providers))
    return lines


def _extras(extras: dict[str, tuple[str, ...]]) -> list[str]:
    from olive.report.console import labelled

    lines = []
    for extra, names in extras.items():
        missing = [name for name in names if _installed(name) is None]
        brings = _BRINGS.get(extra, "")
        if not missing:
            lines += labelled(extra, f"complete: {brings}".rstrip(": "))
        else:
            gain = f"it brings {brings or 'these'}: pip install 'olive-next[{extra}]'"
            lines += labelled(extra, f"lacks {', '.join(missing)}; {gain}")
    return lines


def requirements() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Required distributions, and those of each extra, as the installed package states them."""
    try:
        stated = metadata("olive-next").get_all("Requires-Dist") or []
    except PackageNotFoundError:
        return _REQUIRED, {"cpu": _CPU}
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in stated:
        name = re.split(r"[\s<>=!~;\[(]", line, maxsplit=1)[0].lower()
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        (extras.setdefault(extra[1], []) if extra else required).append(name)
    return tuple(required), {extra: tuple(names) for extra, names in extras.items()}


def loads(modules: dict[str, str]) -> dict[str, str]:
    """Distribution -> why its module does not load, each tried in a process of its own, all at once."""
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"import {module}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for name, module in modules.items()
    }
    failed = {}
    for name, process in started.items():
        try:
            _, said = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failed[name] = "its import takes more than a minute"
            continue
        if process.returncode:
            lines = said.strip().splitlines()
            failed[name] = lines[-1] if lines else f"its import ends with code {process.returncode}"
    return failed


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
