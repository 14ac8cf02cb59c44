"""What each setting of each layer costs the predictions: an estimate, put right by true measurements. Needs
torch.

What is measured on the unquantised model is kept by kind of layer, so that another budget computes nothing
and another setting only what is its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from olive.models.quantised import Layer
from olive.passes.base import Progress
from olive.passes.quantize import targets
from olive.quantization.k_quant import magnitudes, search
from olive.quantization.sensitivity import expected_kl
from olive.store.statistics import Statistics, Tensors

_SAMPLE = 256  # rows that the errors of the further settings are taken from
_CHECKED = 2048  # tokens of a true measurement
_DEPTHS = 4

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]
Options = Mapping[str, Sequence[Layer]]


class Subject:
    """A model and what it is measured on, both made when first asked for.

    Args:
        model: gives it in float32, its parameters without gradients.
        batches: give token ids, padded at the right, and which are real: (rows, length) each.
        rows: what the batches depend on, as JSON.
        data: name of the data config they are of.
        seed: of the drawn labels.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        batches: Callable[[], Batches],
        rows: Mapping[str, Any],
        data: str | None,
        seed: int,
    ) -> None:
        self._model, self._batches = model, batches
        self.rows, self.data, self.seed = dict(rows), data, seed

    @cached_property
    def network(self) -> nn.Module:
        """The model."""
        return self._model()

    @cached_property
    def batches(self) -> Batches:
        """What it is measured on."""
        return self._batches()

    def weight(self, name: str) -> torch.Tensor:
        """The (rows, columns) weight of a layer."""
        return self.network.get_parameter(f"{name}.weight").data


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers of one kind, with their settings; the first of each is the one that predictions are measured at.

    Attributes:
        name: e.g. ``down_proj``; layers that share their settings are of one kind.
        options: of each layer.
        count: decoder layers of the model.
    """

    name: str
    options: Options
    count: int

    @property
    def groups(self) -> dict[str, list[str]]:
        """Group -> its layers: those in one quarter of the depth."""
        found: dict[str, list[str]] = {}
        for name in self.options:
            number = targets.number_of(name)
            part = "" if number is None else f" {_DEPTHS * number // self.count + 1}/{_DEPTHS}"
            found.setdefault(f"{self.name}{part}", []).append(name)
        return found

    @property
    def settings(self) -> dict[Layer, list[str]]:
        """Setting -> the layers that may get it."""
        found: dict[Layer, list[str]] = {}
        for name, many in self.options.items():
            for one in dict.fromkeys(many):
                found.setdefault(one, []).append(name)
        return found

    def errors_key(self, setting: Layer) -> dict[str, Any]:
        """What the errors at a setting depend on."""
        return {
            "kind": self.name,
            "layers": _names(self.settings[setting]),
            "setting": [setting.bits, setting.group_size, setting.symmetric],
            "sample": _SAMPLE,
        }

    def losses_key(self, subject: Subject) -> dict[str, Any]:
        """What the measured losses depend on."""
        first = [many[0] for many in self.options.values()]
        return {
            "kind": self.name,
            "layers": _names(self.options),
            "decoder_layers": self.count,
            "settings": _short([[one.bits, one.group_size, one.symmetric] for one in first]),
            "dtype": "float32",
            "seed": subject.seed,
            "checked": _CHECKED,
            **subject.rows,
        }


def losses(
    subject: Subject, options: Options, progress: Progress, statistics: Statistics
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """KL(model || model with one layer at a setting), nat a token.

    The second-order estimate is made for the first setting of each layer. Layers of one kind in one quarter
    of the depth are then changed together, and their estimates scaled to the KL that this gives: it has what
    the estimate leaves out, common to positions and between layers. The other settings follow in proportion
    to their squared error, by column, weighted with the energy of the layer's inputs.

    Args:
        subject: the model and the rows.
        options: settings of each layer.
        progress: where to say how far it is.
        statistics: where measurements are found and kept.

    Returns:
        Of each layer the KL of each setting; and of each group, true KL over the sum of the estimates.
    """
    kinds = _kinds(options)
    measured = _measured(subject, kinds, progress, statistics)
    made: dict[str, list[float]] = {}
    scales: dict[str, float] = {}
    for kind in kinds:
        values = measured[kind.name]
        errors = {one: _errors(subject, kind, one, statistics) for one in kind.settings}
        estimates = dict(zip(kind.options, values["estimates"].tolist(), strict=True))
        for (group, names), true in zip(kind.groups.items(), values["true"].tolist(), strict=True):
            scales[group] = true / max(sum(estimates[name] for name in names), 1e-30)
            for name in names:
                energy = values[f"energy.{name}"]
                shares = [float(errors[one][name] @ energy) for one in options[name]]
                low = estimates[name] * scales[group]
                made[name] = [low * share / max(shares[0], 1e-30) for share in shares]
    return {name: made[name] for name in options}, scales


def _kinds(options: Options) -> list[_Kind]:
    count = 1 + max((targets.number_of(name) or 0 for name in options), default=0)
    found: dict[str, dict[str, Sequence[Layer]]] = {}
    for name, many in options.items():
        last = name.rpartition(".")[2]
        kind = next((key[0] for key in targets.SHARED if last in key), last)
        found.setdefault(kind, {})[name] = many
    return [_Kind(name, own, count) for name, own in found.items()]


def _measured(
    subject: Subject, kinds: Sequence[_Kind], progress: Progress, statistics: Statistics
) -> dict[str, Tensors]:
    """Kind -> of each layer the estimate and the energy of its inputs, and of each group the true KL."""

    def look(kind: _Kind) -> Tensors | None:
        return statistics.find("losses", kind.losses_key(subject), data=subject.data)

    found = {kind.name: look(kind) for kind in kinds}
    if any(values is None for values in found.values()):
        # one process at a time: the model is run once for all kinds
        with statistics.turn("losses", subject.rows, data=subject.data):
            missing = [kind for kind in kinds if found[kind.name] is None]
            found |= {kind.name: look(kind) for kind in missing}
            missing = [kind for kind in missing if found[kind.name] is None]
            if missing:
                made = _measure(subject, missing, progress)
                for kind in missing:
                    statistics.keep("losses", kind.losses_key(subject), made[kind.name], data=subject.data)
                found |= made
    return {name: values for name, values in found.items() if values is not None}


def _errors(subject: Subject, kind: _Kind, setting: Layer, statistics: Statistics) -> Tensors:
    """Of each layer that may get a setting, its squared error there by column, over some of its rows."""

    def compute() -> Tensors:
        made = {}
        for name in kind.settings[setting]:
            weight = subject.weight(name)
            part = weight[:: -(-len(weight) // _SAMPLE)]
            made[name] = (_quantised(part, setting) - part).square().sum(0).cpu()
        return made

    return statistics.of("errors", kind.errors_key(setting), compute)


def _measure(subject: Subject, kinds: Sequence[_Kind], progress: Progress) -> dict[str, Tensors]:
    """``_measured`` of some kinds."""
    network, options = subject.network, {name: many for kind in kinds for name, many in kind.options.items()}
    changes: dict[str, torch.Tensor] = {}
    progress.start("settings", len(options))
    for done, (name, many) in enumerate(options.items(), 1):
        weight = subject.weight(name)
        changes[name] = (_quantised(weight, many[0]) - weight).bfloat16()
        progress.update(done)
    progress.finish()
    energies: dict[str, torch.Tensor] = {}

    def entered(name: str, inputs: torch.Tensor) -> None:
        squares = inputs.detach().flatten(0, -2).square()
        share = (squares / squares.sum(-1, keepdim=True).clamp(min=1e-20)).sum(0)
        energies[name] = energies[name] + share if name in energies else share

    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: entered(name, given[0])
        )
        for name in options
    ]
    candidates = {name: [change] for name, change in changes.items()}
    try:
        found = expected_kl(network, subject.batches, candidates, subject.seed)
    finally:
        for hook in hooks:
            hook.remove()
    groups = {group: names for kind in kinds for group, names in kind.groups.items()}
    true = _true(subject, groups, changes, progress)
    return {
        kind.name: {
            "estimates": torch.tensor([found[name][0] for name in kind.options], dtype=torch.float64),
            "true": torch.tensor([true[group] for group in kind.groups], dtype=torch.float64),
        }
        | {f"energy.{name}": energies[name].cpu() for name in kind.options}
        for kind in kinds
    }


def _quantised(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    return search(weight, layer.grid, magnitudes(weight, layer.grid)).dequantise()


def _true(
    subject: Subject,
    groups: Mapping[str, Sequence[str]],
    changes: Mapping[str, torch.Tensor],
    progress: Progress,
) -> dict[str, float]:
    """Group -> true KL of changing all its layers, nat a token."""
    network, checked, tokens = subject.network, [], 0
    for ids, real in subject.batches:
        if tokens < _CHECKED:
            checked.append((ids, real))
            tokens += int(real.sum())
    totals = dict.fromkeys(groups, 0.0)
    device = next(network.parameters()).device
    progress.start("measured KL", len(checked) * len(groups))
    with torch.inference_mode():
        for place, (ids, real) in enumerate(checked):
            own = _predicted(network, ids, real, device)
            shares = own.exp()
            for done, (group, names) in enumerate(groups.items(), 1):
                kept = {name: subject.weight(name).clone() for name in names}
                for name in names:
                    subject.weight(name).add_(changes[name])
                changed = _predicted(network, ids, real, device)
                totals[group] += float(changed.sub_(own).neg_().mul_(shares).sum())
                for name, weight in kept.items():
                    subject.weight(name).copy_(weight)
                progress.update(place * len(groups) + done)
    progress.finish()
    return {group: max(total / max(tokens, 1), 0.0) for group, total in totals.items()}


def _predicted(
    network: nn.Module, ids: torch.Tensor, real: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(tokens, vocabulary) log probabilities."""
    logits = network(input_ids=ids.to(device), use_cache=False).logits
    return logits[real.to(device)].float().log_softmax(-1)


def _names(names: Sequence[str] | Mapping[str, object]) -> str:
    return _short(list(names))


def _short(values: Sequence[object]) -> str:
    """Their number and the beginning of their sha256: a model may have thousands of layers."""
    return f"{len(values)}, {hashlib.sha256(repr(values).encode()).hexdigest()[:16]}"
