"""The base model as an adapter's training saw it, where that is not what is stored.

QLoRA trains on weights rounded to 4 bits, LoftQ on weights that were changed and then rounded. An adapter of
that kind says so in ``base/seen.json`` beside its own files; without that file it was trained on the base as
it is stored. Whatever loads or merges the adapter starts from the weights given here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.errors import UntrustedInput
from olive.models.tensors import read_header

if TYPE_CHECKING:
    import torch

    from olive.quantization.blockwise import Scheme

FOLDER = "base"
_FILE, _INITIAL = "seen.json", "initial.safetensors"


@dataclass(frozen=True, slots=True)
class Seen:
    """What training did to the base before it began.

    Attributes:
        kind, block, double: how weights were rounded (``olive.quantization.blockwise.Scheme``).
        modules: linear layers whose weight was rounded.
        initial: module -> (A, B) with B A, scale included, taken off its weight before rounding.
    """

    kind: str
    block: int
    double: bool
    modules: frozenset[str]
    initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def scheme(self) -> Scheme:
        """The rounding."""
        from olive.quantization.blockwise import Scheme

        return Scheme(self.kind, self.block, self.double)  # type: ignore[arg-type]

    def changes(self, name: str) -> bool:
        """Whether the tensor of this name was not seen as it is stored."""
        return name.removesuffix(".weight") in self.modules and name.endswith(".weight")

    def tensor(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The tensor as training saw it: ``stored`` itself, or float32 where it was changed."""
        if not self.changes(name):
            return stored
        from olive.quantization.blockwise import round_trip

        wide = stored.float()
        if (factors := self.initial.get(name.removesuffix(".weight"))) is not None:
            a, b = factors
            wide = wide - b.float() @ a.float()
        return round_trip(wide, self.scheme)

    def apply(self, model: torch.nn.Module) -> None:
        """Change the weights of a model loaded from the stored base, in place; nothing is wrapped yet."""
        import torch

        with torch.no_grad():
            for name in sorted(self.modules):
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(self.tensor(f"{name}.weight", weight))

    def write(self, adapter: Path) -> None:
        """Say it beside the adapter's files."""
        from safetensors.torch import save_file

        folder = adapter / FOLDER
        folder.mkdir(exist_ok=True)
        body = {name: value for name, value in asdict(self).items() if name in ("kind", "block", "double")}
        body["modules"] = sorted(self.modules)
        (folder / _FILE).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        if self.initial:
            factors = {
                f"{module}.{part}": value.contiguous()
                for module, pair in sorted(self.initial.items())
                for part, value in zip("AB", pair, strict=True)
            }
            save_file(factors, folder / _INITIAL)


def read(adapter: Path) -> Seen | None:
    """What an adapter says of its base; None when it was trained on the base as stored.

    Raises:
        UntrustedInput: the file is damaged.
    """
    path = adapter / FOLDER / _FILE
    if not path.is_file():
        return None
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind, block, double = str(body["kind"]), int(body["block"]), bool(body["double"])
        modules = frozenset(map(str, body["modules"]))
        if kind not in ("nf4", "fp4", "int8") or not 2 <= block <= 1 << 16:
            raise ValueError(f"{kind} in blocks of {block} is no rounding known here")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UntrustedInput(
            f"{path} is damaged: {error}", fix="Train the adapter again, or copy it again."
        ) from error
    return Seen(kind, block, double, modules, _initial(adapter / FOLDER / _INITIAL))


def _initial(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    if not path.is_file():
        return {}
    read_header(path)
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {
        name.removesuffix(".A"): (tensors[name], tensors[f"{name.removesuffix('.A')}.B"])
        for name in tensors
        if name.endswith(".A")
    }
