"""What the installed onnxruntime-genai model builder can do, read from its source: no import, no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_ARCHITECTURE = re.compile(r"""architectures\[0\] == ["'](\w+)["']""")
_OPTION = re.compile(
    r"""extra_options(?:\.get\(|\.pop\(|\[)\s*["'](\w+)["']"""
    r"""|["'](\w+)["'] (?:not )?in (?:self\.)?extra_options"""
)
_LISTED = re.compile(r"^ {16}(?:\[\w+\] )?(\w+) = ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class BuilderSource:
    """What the source says.

    Attributes:
        architectures: values of ``architectures[0]`` it exports.
        options: names of extra options it reads.
    """

    architectures: frozenset[str]
    options: frozenset[str]


@cache
def read() -> BuilderSource | None:
    """The installed builder, or None when there is none."""
    spec = find_spec("onnxruntime_genai")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0], "models")
    main = folder / "builder.py"
    if not main.is_file():
        return None
    text = main.read_text(encoding="utf-8")
    options = set(_LISTED.findall(text))
    for path in (main, *folder.glob("builders/*.py"), *folder.glob("quantization/*.py")):
        options |= {a or b for a, b in _OPTION.findall(path.read_text(encoding="utf-8"))}
    return BuilderSource(
        frozenset(_ARCHITECTURE.findall(text)),
        frozenset(name for name in options if not name.startswith("_")),
    )
