"""A model's decoder layers, one in memory at a time, run on calibration rows. Needs torch.

The model is built without weights; embedding, then layer by layer, take theirs from the safetensors file when
their turn comes. Hidden states between layers stay in memory: tokens x hidden size.
"""

from __future__ import annotations

import copy
import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olive.errors import PassFailed
from olive.models.hf import read_json
from olive.models.quantised import Layer
from olive.models.skeleton import skeleton
from olive.models.stream import LazyTensors
from olive.passes.quantize.calibration import PER_BATCH, Calibration
from olive.passes.quantize.shelf import Shelf
from olive.passes.quantize.states import Ahead, States
from olive.quantization.hessian import Moments, add_product

_PER_BATCH_GPU = 1 << 13  # tokens
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
        closed: no other layer will turn out to read the same input.
        waiting: how many of its layers are not quantised yet; 0 where that is not known.
    """

    def __init__(self, width: int, device: torch.device, paired: bool) -> None:
        self.names: list[str] = []
        self.solved: Any = None
        self.closed, self.waiting = False, 0
        self.moments = Moments(width, device)
        self.drift = torch.zeros(width, width, device=device) if paired else None

    def add(self, now: torch.Tensor, before: torch.Tensor | None) -> None:
        """Add inputs (tokens, width)."""
        self.moments.add(now)
        if self.drift is not None and before is not None:
            add_product(self.drift, before - now, now)


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
        self.device, self.paired = torch.device(device), paired
        self.tensors = Ahead(tensors, self.device)
        # a GPU runs the model as it would otherwise run; what is added up and solved is float32 all the same
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = skeleton(folder)
        for module in self.model.modules():  # frequencies of rotary embeddings
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        config = read_json(folder / "config.json")
        self.model_type = str(config.get("model_type", ""))
        self.prefix, self.layers = _decoder_layers(self.model, config)
        self.masks: list[torch.Tensor] = []  # which tokens are no padding
        self.real: list[torch.Tensor | None] = []  # the same; None where all are
        self.given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.width = int(self.model.get_input_embeddings().weight.shape[1])
        self.now = States(self.device, (1 + paired) * calibration.tokens * self.width * self.dtype.itemsize)
        self._embed(calibration)
        self.before = self.now.copy() if paired else States(self.device, 0)

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
        limit = PER_BATCH if self.device.type == "cpu" else _PER_BATCH_GPU
        for ids, real in calibration.batches(limit):
            with suppress(_Stop):
                self.model(input_ids=ids.to(self.device), use_cache=False)
            self.given.append([recorder.given for recorder in recorders])
            self.now.append(recorders[0].hidden)
            self.masks.append(real.to(self.device))
            self.real.append(None if bool(real.all()) else self.masks[-1])
        for place, layer in enumerate(plain):
            self.layers[place] = layer
        embedding.to("meta")

    def _load(self, module: nn.Module, name: str) -> None:
        """Give a module its weights."""
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
                value = self.tensors[full].to(self.device, self.dtype, non_blocking=True)
                holder._parameters[key] = nn.Parameter(value, requires_grad=False)

    @contextmanager
    def layer(self, number: int) -> Iterator[nn.Module]:
        """Layer ``number`` with its weights; they leave memory at the end."""
        layer = self.layers[number]
        following = number + 1
        self.tensors.turn(
            f"{self.prefix}.{number}", f"{self.prefix}.{following}" if following < len(self) else None
        )
        self._load(layer, f"{self.prefix}.{number}")
        try:
            yield layer
        finally:
            layer.to("meta")
            if self.device.type == "cuda":
                gc.collect()  # modules and what their hooks have seen refer to each other

    @torch.no_grad()
    def advance(self, number: int, layer: nn.Module, original: nn.Module | None) -> None:
        """Replace the hidden states by what the layer makes of them."""
        for runner, states in ((layer, self.now), (original, self.before)):
            if runner is not None:
                for place, hidden in enumerate(states):
                    states[place] = _run(runner, hidden, self.given[place][number])

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
                moments = Moments(self.width, self.device)
                for hidden, real in zip(self.now, self.real, strict=True):
                    moments.add(_tokens(norm(hidden), real))
                return moments
        return None

    @torch.no_grad()
    def sweep(self, number: int, layer: nn.Module, quantise: Quantise) -> None:
        """Quantise the layer's linear layers in the order they run, each on what those before it now give.

        With one batch the layer runs once, and each group is quantised when the forward pass reaches it. With
        more, the layer runs as far as the next group on every batch, and the group is quantised then.
        """
        original = copy.deepcopy(layer) if self.paired else None
        todo = {
            f"{self.prefix}.{number}.{name}": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        twins = {} if original is None else _twins(layer, original)
        if len(self.given) == 1:
            self._sweep_once(number, layer, original, todo, twins, quantise)
            return
        while todo and (found := self._next_group(number, layer, original, todo, twins)) is not None:
            group, ended = found
            quantise(group, {name: todo.pop(name) for name in group.names})
            del group, found
            original = None if ended else original
        self.advance(number, layer, original)

    def _sweep_once(
        self,
        number: int,
        layer: nn.Module,
        original: nn.Module | None,
        todo: dict[str, nn.Linear],
        twins: Mapping[nn.Module, str],
        quantise: Quantise,
    ) -> None:
        """One batch: groups are quantised as the forward pass comes to them."""
        given, inputs = self.given[0][number], {}
        if original is not None:
            (before,) = self.before
            inputs = _originals(original, before, given)
            self.before[0] = inputs["out"]
        probe = _Probe(todo, twins, inputs, self.real[0], quantise, self.paired)
        (now,) = self.now
        with _hooked(dict(todo), probe.enter):
            self.now[0] = _run(layer, now, given)

    def _next_group(
        self,
        number: int,
        layer: nn.Module,
        original: nn.Module | None,
        todo: Mapping[str, nn.Linear],
        twins: Mapping[nn.Module, str],
    ) -> tuple[Group, bool] | None:
        """The linear layers that come next in the forward pass, and their inputs from all batches.

        Where they are the last ones the unchanged layer runs to its end, since nothing more is asked of it.

        Returns:
            The group, and whether the unchanged layer's outputs have replaced its inputs; None where no layer
            of ``todo`` is called.
        """
        group: Group | None = None
        names: list[str] = []
        ended = False
        others = iter(self.before)
        for place, hidden in enumerate(self.now):
            given, real = self.given[place][number], self.real[place]
            names, value = _reach(layer, todo, hidden, given, names)
            if value is None:
                return None
            before = None
            if original is not None:
                ended = len(names) == len(todo)
                twin = {"": original.get_submodule(twins[todo[names[0]]])}
                states = next(others)
                if ended:
                    _, before, out = _through(original, twin, states, given)
                    self.before[place] = out
                else:
                    _, before = _reach(original, twin, states, given, [""])
            if group is None:
                group = Group(value.shape[-1], value.device, self.paired)
                group.names, group.closed = list(names), True
            group.add(_tokens(value, real), None if before is None else _tokens(before, real))
        return None if group is None else (group, ended)


class _Probe:
    """Hooks on the linear layers of one forward pass, which quantise each when it is reached."""

    def __init__(
        self,
        todo: dict[str, nn.Linear],
        twins: Mapping[nn.Module, str],
        inputs: Mapping[str, torch.Tensor],
        real: torch.Tensor | None,
        quantise: Quantise,
        paired: bool,
    ) -> None:
        self.todo, self.twins, self.inputs, self.real = todo, twins, inputs, real
        self.quantise, self.paired = quantise, paired
        self.group: Group | None = None
        self.seen: torch.Tensor | None = None

    def enter(self, name: str, value: torch.Tensor) -> None:
        if name not in self.todo:
            return
        if value is not self.seen or self.group is None:
            self.seen, self.group = value, Group(value.shape[-1], value.device, self.paired)
            before = self.inputs.get(self.twins.get(self.todo[name], ""))
            self.group.add(_tokens(value, self.real), None if before is None else _tokens(before, self.real))
        self.group.names.append(name)
        self.quantise(self.group, {name: self.todo.pop(name)})


def _tokens(value: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """(tokens, width): the tokens that are no padding."""
    return value.reshape(-1, value.shape[-1]) if real is None else value[real]


def _reach(
    layer: nn.Module,
    modules: Mapping[str, nn.Module],
    hidden: torch.Tensor,
    given: tuple[tuple[Any, ...], dict[str, Any]],
    known: list[str],
) -> tuple[list[str], torch.Tensor | None]:
    """Run a layer as far as the first of ``modules``: which of them read the same input, and that input.

    With ``known`` the answer to the first is known, and the pass ends at once.
    """
    names: list[str] = list(known)
    found: list[torch.Tensor] = []

    def enter(name: str, value: torch.Tensor) -> None:
        if found and value is not found[0]:
            raise _Stop
        if not found:
            found.append(value)
        if known:
            raise _Stop
        names.append(name)

    try:
        with _hooked(modules, enter):
            _run(layer, hidden, given)
    except _Stop as stop:  # its frames hold the activations of the layer
        traceback.clear_frames(stop.__traceback__)
    return names, found[0] if found else None


def _through(
    layer: nn.Module,
    modules: Mapping[str, nn.Module],
    hidden: torch.Tensor,
    given: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[list[str], torch.Tensor | None, torch.Tensor]:
    """As ``_reach``, to the end of the layer: also what it gives."""
    found: dict[str, torch.Tensor] = {}
    with _hooked(modules, found.setdefault):
        out = _run(layer, hidden, given)
    return list(found), next(iter(found.values()), None), out


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], enter: Callable[[str, torch.Tensor], object]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        enter(name, args[0])

    hooks = [module.register_forward_pre_hook(partial(hook, name=name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


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
    modules = {name: module for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    with _hooked(modules, found.__setitem__):
        found["out"] = _run(original, hidden, given)
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
