"""A model's decoder layers, one in memory at a time, run on calibration rows. Needs torch.

The model is built without weights; embedding, then layer by layer, take theirs from the safetensors file when
their turn comes. Hidden states between layers stay in memory: tokens x hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olive.errors import PassFailed
from olive.models.hf import read_json
from olive.models.quantised import Layer
from olive.models.skeleton import skeleton
from olive.models.stream import LazyTensors
from olive.passes.quantize.calibration import Calibration
from olive.passes.quantize.shelf import Shelf
from olive.quantization.hessian import Moments

_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class _Stop(Exception):
    """The forward pass has come as far as it is needed."""


class _Recorder(nn.Module):
    """Stands for a decoder layer and keeps what it is called with."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.hidden = torch.empty(0)
        self.last = last
        kind = getattr(layer, "attention_type", None)
        if kind is not None:
            self.attention_type = kind

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pass the hidden states on as they came."""
        dropped = ("past_key_values", "past_key_value", "use_cache")
        self.given = (args, {name: value for name, value in kwargs.items() if name not in dropped})
        self.hidden = hidden
        if self.last:
            raise _Stop
        return hidden


class Group:
    """Linear layers that read one input.

    Attributes:
        names: of the linear layers.
        moments: of their input, as the layers before it make it now.
        drift: sum of (input of the unchanged model - input now) x (input now)^T, float32 (width, width); None
            where the unchanged model does not run beside.
        solved: what a method keeps for the layers of the group that come after the first.
    """

    def __init__(self, width: int, device: torch.device, paired: bool) -> None:
        self.names: list[str] = []
        self.solved: Any = None
        self.moments = Moments(width, device)
        self.drift = torch.zeros(width, width, device=device) if paired else None

    def add(self, now: torch.Tensor, before: torch.Tensor | None) -> None:
        """Add inputs (tokens, width)."""
        self.moments.add(now)
        if self.drift is not None and before is not None:
            self.drift.addmm_((before - now).T, now)


Quantise = Callable[[Group, Mapping[str, nn.Linear]], None]


class LayerStream:
    """Runs calibration rows through a model whose layers are changed on the way.

    Args:
        folder: of the model.
        tensors: its weights.
        calibration: the rows.
        device: where to compute.
        paired: run the unchanged model beside.
    """

    def __init__(
        self, folder: Path, tensors: LazyTensors, calibration: Calibration, device: str, paired: bool
    ) -> None:
        self.tensors, self.device, self.paired = tensors, torch.device(device), paired
        self.model = skeleton(folder)
        for module in self.model.modules():  # frequencies of rotary embeddings
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        config = read_json(folder / "config.json")
        self.model_type = str(config.get("model_type", ""))
        self.prefix, self.layers = _decoder_layers(self.model, config)
        self.real: list[torch.Tensor] = []
        self.now: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []
        self.given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._embed(calibration)

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def _embed(self, calibration: Calibration) -> None:
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._load(embedding, name)
        plain = list(self.layers)
        recorders = [_Recorder(layer, layer is plain[-1]) for layer in plain]
        for place, recorder in enumerate(recorders):
            self.layers[place] = recorder
        for ids, real in calibration.batches():
            with suppress(_Stop):
                self.model(input_ids=ids.to(self.device), use_cache=False)
            self.given.append([recorder.given for recorder in recorders])
            self.now.append(recorders[0].hidden)
            self.real.append(real.to(self.device))
        for place, layer in enumerate(plain):
            self.layers[place] = layer
        embedding.to("meta")
        if self.paired:
            self.before = list(self.now)

    def _load(self, module: nn.Module, name: str) -> None:
        """Give a module its weights, in float32."""
        for path, holder in module.named_modules():
            for key in list(holder._parameters):
                if holder._parameters[key] is None:
                    continue
                full = ".".join(part for part in (name, path, key) if part)
                if full not in self.tensors:
                    raise PassFailed(
                        f"the file of weights has no {full}, which the model's own code expects",
                        fix="Use KQuant: it needs no forward pass.",
                    )
                value = self.tensors[full].to(self.device, torch.float32)
                holder._parameters[key] = nn.Parameter(value, requires_grad=False)

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Layer ``number`` with its weights; they leave memory at the end."""
        layer = self.layers[number]
        self._load(layer, f"{self.prefix}.{number}")
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def advance(self, number: int, layer: nn.Module, original: nn.Module | None) -> None:
        """Replace the hidden states by what the layer makes of them."""
        for place, given in enumerate(self.given):
            self.now[place] = _run(layer, self.now[place], given[number])
            if original is not None:
                self.before[place] = _run(original, self.before[place], given[number])

    @torch.no_grad()
    def restore(
        self, number: int, layer: nn.Module, names: list[str], shelf: Shelf, chosen: Mapping[str, Layer]
    ) -> None:
        """Go past a layer that an earlier run finished, or that stays as it is."""
        original = copy.deepcopy(layer) if self.paired else None
        for name in names:
            module = layer.get_submodule(name.removeprefix(f"{self.prefix}.{number}."))
            if isinstance(module, nn.Linear):
                module.weight.data.copy_(shelf.expanded(name, chosen[name], module.in_features))
        for name in shelf.replaced:
            if name.startswith(f"{self.prefix}.{number}."):
                layer.get_parameter(name.removeprefix(f"{self.prefix}.{number}.")).data.copy_(
                    shelf.load(name)
                )
        self.advance(number, layer, original)

    @torch.no_grad()
    def final_moments(self) -> Moments | None:
        """Moments of what the head reads; None where the norm before it is not found."""
        parent = self.model.get_submodule(self.prefix.rpartition(".")[0])
        for name in _FINAL_NORMS:
            norm = getattr(parent, name, None)
            if isinstance(norm, nn.Module):
                self._load(norm, f"{self.prefix.rpartition('.')[0]}.{name}")
                moments = Moments(self.now[0].shape[-1], self.device)
                for hidden, real in zip(self.now, self.real, strict=True):
                    moments.add(norm(hidden)[real])
                return moments
        return None

    @torch.no_grad()
    def sweep(self, number: int, layer: nn.Module, quantise: Quantise) -> None:
        """Quantise the layer's linear layers in the order they run, each on what those before it now give.

        With one batch the layer runs once, and each group is quantised when the forward pass reaches it. With
        more, the layer runs as far as the next group on every batch, and the group is quantised then.
        """
        original = copy.deepcopy(layer) if self.paired else None
        linears = {
            f"{self.prefix}.{number}.{name}": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        todo = dict(linears)
        twins = {} if original is None else _twins(layer, original)
        single = len(self.given) == 1
        while todo:
            group: Group | None = None
            for place, given in enumerate(self.given):
                inputs = (
                    _originals(original, self.before[place], given[number]) if original is not None else {}
                )
                probe = _Probe(todo, twins, inputs, self.real[place], group, single, quantise, self.paired)
                with probe.attached():
                    try:
                        out = _run(layer, self.now[place], given[number])
                    except _Stop:
                        out = None
                group = probe.group
                if single and out is not None:
                    self.now[place] = out
                    if original is not None:
                        self.before[place] = inputs["out"]
                    return
            if group is None or not group.names:
                return
            quantise(group, {name: todo.pop(name) for name in group.names})
        self.advance(number, layer, original)


class _Probe:
    """Hooks on the linear layers of one forward pass."""

    def __init__(
        self,
        todo: dict[str, nn.Linear],
        twins: Mapping[nn.Module, str],
        inputs: Mapping[str, torch.Tensor],
        real: torch.Tensor,
        group: Group | None,
        single: bool,
        quantise: Quantise,
        paired: bool,
    ) -> None:
        self.todo, self.twins, self.inputs, self.real = todo, twins, inputs, real
        self.group, self.single, self.quantise, self.paired = group, single, quantise, paired
        self.seen: torch.Tensor | None = None
        self.whole = bool(real.all())

    @contextmanager
    def attached(self) -> Iterator[None]:
        hooks = [
            module.register_forward_pre_hook(lambda module, given, name=name: self._enter(name, given[0]))
            for name, module in self.todo.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, value: torch.Tensor) -> None:
        if name not in self.todo:
            return
        if self.seen is not None and value is not self.seen:
            if not self.single:
                raise _Stop
            self.seen, self.group = None, None
        if self.seen is None:
            self.seen = value
            if self.group is None:
                self.group = Group(value.shape[-1], value.device, self.paired)
            module = self.todo[name]
            before = self.inputs.get(self.twins.get(module, ""))
            self.group.add(self._real(value), None if before is None else self._real(before))
        assert self.group is not None  # noqa: S101 - set with ``seen``
        if name not in self.group.names:
            self.group.names.append(name)
        if self.single:
            self.quantise(self.group, {name: self.todo.pop(name)})

    def _real(self, value: torch.Tensor) -> torch.Tensor:
        """(tokens, width): the tokens that are no padding."""
        return value.reshape(-1, value.shape[-1]) if self.whole else value[self.real]


def _run(
    layer: nn.Module, hidden: torch.Tensor, given: tuple[tuple[Any, ...], dict[str, Any]]
) -> torch.Tensor:
    made = layer(hidden, *given[0], **given[1])
    return made[0] if isinstance(made, tuple) else made


def _twins(layer: nn.Module, original: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _originals(
    original: nn.Module, hidden: torch.Tensor, given: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer of the unchanged layer, and its output under ``out``."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.__setitem__(name, args[0]))
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        found["out"] = _run(original, hidden, given)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _decoder_layers(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, nn.ModuleList]:
    count = config.get("num_hidden_layers")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise PassFailed(
        f"no list of {count} decoder layers in {type(model).__name__}",
        fix="Use KQuant: it needs no forward pass.",
    )
