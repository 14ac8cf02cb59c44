"""A model's decoder layers, one in memory at a time, run on calibration rows. Needs torch.

The model is built without weights; embedding, then layer by layer, take theirs from the safetensors file when
their turn comes. Hidden states between layers stay in memory: tokens x hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
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
from olive.passes.quantize.calibration import PER_BATCH, Calibration
from olive.passes.quantize.forward import (
    Given,
    Group,
    Probe,
    Quantise,
    Stop,
    hooked,
    reach,
    run,
    through,
    tokens,
)
from olive.passes.quantize.shelf import Shelf
from olive.passes.quantize.states import Ahead, Replay, States
from olive.quantization.hessian import Moments

_PER_BATCH_GPU = 1 << 13  # tokens
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


class _Recorder(nn.Module):
    """Stands for a decoder layer and keeps what it is called with."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.given: Given = ((), {})
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
            raise Stop
        return hidden


class LayerStream:
    """Runs calibration rows through a model whose layers are changed on the way.

    Args:
        folder: of the model.
        tensors: its weights.
        calibration: the rows.
        device: where to compute.
        paired: run the unchanged model beside on the first batches, as far as they hold so many tokens.
    """

    def __init__(
        self, folder: Path, tensors: LazyTensors, calibration: Calibration, device: str, paired: int
    ) -> None:
        self.device, self.paired = torch.device(device), paired > 0
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
        self.given: list[list[Given]] = []
        self.width = int(self.model.get_input_embeddings().weight.shape[1])
        size = calibration.tokens * self.width * self.dtype.itemsize
        self.now = States(self.device, (1 + self.paired) * size)
        self._embed(calibration)
        beside = self._batches(paired)
        self.before = self.now.copy(beside)
        self.replays = [Replay(self.device, size, count) for count in (len(self.given), beside) if count]

    def __len__(self) -> int:
        return len(self.layers)

    def _batches(self, tokens: int) -> int:
        """How many batches it takes to hold so many tokens."""
        held, count = 0, 0
        while held < tokens and count < len(self.masks):
            held += int(self.masks[count].sum())
            count += 1
        return count

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
            with suppress(Stop):
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
        if self.device.type == "cuda":
            from olive.passes.quantize.gpu_layer import hasten

            hasten(layer)
        try:
            yield layer
        finally:
            layer.to("meta")

    @torch.no_grad()
    def advance(self, number: int, layer: nn.Module, original: nn.Module | None) -> None:
        """Replace the hidden states by what the layer makes of them."""
        for replay in self.replays:
            replay.rewind()
        for runner, states in ((layer, self.now), (original, self.before)):
            if runner is not None:
                for place, hidden in enumerate(states):
                    states[place] = run(runner, hidden, self.given[place][number])

    @torch.no_grad()
    def restore(
        self, number: int, layer: nn.Module, names: list[str], shelf: Shelf, chosen: Mapping[str, Layer]
    ) -> None:
        """Go past a layer that an earlier run finished, or that stays as it is."""
        original = self._twin(layer)
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
        leave(original)

    def _twin(self, layer: nn.Module) -> nn.Module | None:
        """The layer as it is now, to run beside."""
        return copy.deepcopy(layer) if self.paired else None

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
                    moments.add(tokens(norm(hidden), real))
                return moments
        return None

    @torch.no_grad()
    def sweep(self, number: int, layer: nn.Module, quantise: Quantise) -> None:
        """Quantise the layer's linear layers in the order they run, each on what those before it now give.

        With one batch the layer runs once, and each group is quantised when the forward pass reaches it. With
        more, the layer runs as far as the next group on every batch, and the group is quantised then.
        """
        prefix = f"{self.prefix}.{number}."
        original = self._twin(layer)
        todo = _linears(layer, prefix)
        if len(self.given) == 1:
            self._sweep_once(number, layer, original, todo, quantise)
            leave(original)
            return
        twins = {} if original is None else _linears(original, prefix)
        attention = None
        while todo and (found := self._next_group(number, layer, original, todo, twins)) is not None:
            group, ended = found
            quantise(group, {name: todo.pop(name) for name in group.names})
            del group, found
            if ended:
                leave(original)
                original = None
            if attention is None and (attention := _done_attention(layer, prefix, todo)) is not None:
                for replay, runner in zip(self.replays, (layer, original), strict=False):
                    if runner is not None:
                        replay.attach(runner.get_submodule(attention))
        self.advance(number, layer, original)
        for replay in self.replays:
            replay.detach()
        leave(original)

    def _sweep_once(
        self,
        number: int,
        layer: nn.Module,
        original: nn.Module | None,
        todo: dict[str, nn.Linear],
        quantise: Quantise,
    ) -> None:
        """One batch: groups are quantised as the forward pass comes to them."""
        given, inputs = self.given[0][number], None
        if original is not None:
            twins = _linears(original, f"{self.prefix}.{number}.")
            inputs, self.before[0] = through(original, twins, self.before[0], given)
        probe = Probe(todo, inputs, self.real[0], quantise)
        with hooked(dict(todo), probe.enter):
            self.now[0] = run(layer, self.now[0], given)

    def _next_group(
        self,
        number: int,
        layer: nn.Module,
        original: nn.Module | None,
        todo: Mapping[str, nn.Linear],
        twins: Mapping[str, nn.Linear],
    ) -> tuple[Group, bool] | None:
        """The linear layers that come next in the forward pass, and their inputs from all batches.

        Where they are the last ones the unchanged layer runs to its end, since nothing more is asked of it.

        Returns:
            The group, and whether the unchanged layer's outputs have replaced its inputs; None where no layer
            of ``todo`` is called.
        """
        for replay in self.replays:
            replay.rewind()
        group: Group | None = None
        names: list[str] = []
        ended = False
        others = iter(self.before)
        for place, hidden in enumerate(self.now):
            given, real = self.given[place][number], self.real[place]
            names, value = reach(layer, todo, hidden, given, names)
            if value is None:
                return None
            before = None
            if original is not None and place < len(self.before):
                ended = len(names) == len(todo)
                first, states = {names[0]: twins[names[0]]}, next(others)
                if ended:
                    read, self.before[place] = through(original, first, states, given)
                    before = read.get(names[0])
                else:
                    _, before = reach(original, first, states, given, names)
            if group is None:
                group = Group(value.shape[-1], value.device, self.paired)
                group.names, group.closed = list(names), True
            group.add(tokens(value, real), None if before is None else tokens(before, real))
        return None if group is None else (group, ended)


def _linears(layer: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Linear layers by their names in the model."""
    return {
        f"{prefix}{name}": module for name, module in layer.named_modules() if isinstance(module, nn.Linear)
    }


def leave(layer: nn.Module | None) -> None:
    """Let go of a layer's weights; functions put into its modules would else hold them until a collection."""
    if layer is not None:
        layer.to("meta")


def _done_attention(layer: nn.Module, prefix: str, todo: Mapping[str, nn.Linear]) -> str | None:
    """The attention inside the layer whose linear layers are all quantised."""
    for name, module in layer.named_children():
        if type(module).__name__.endswith("Attention") and not any(
            left.startswith(f"{prefix}{name}.") for left in todo
        ):
            return name
    return None


def _decoder_layers(model: nn.Module, config: Mapping[str, Any]) -> tuple[str, nn.ModuleList]:
    count = config.get("num_hidden_layers")
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise PassFailed(
        f"no list of {count} decoder layers in {type(model).__name__}",
        fix="Use KQuant: it needs no forward pass.",
    )
