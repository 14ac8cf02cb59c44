"""What each setting of each layer costs the predictions: an estimate, put right by true measurements. Needs
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from olive.models.quantised import Layer
from olive.passes.base import Progress
from olive.passes.quantize import targets
from olive.quantization.k_quant import magnitudes, search
from olive.quantization.sensitivity import expected_kl

_SAMPLE = 256  # rows that the errors of the further settings are taken from
_CHECKED = 2048  # tokens of a true measurement
_DEPTHS = 4

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def losses(
    network: nn.Module,
    batches: Batches,
    options: Mapping[str, Sequence[Layer]],
    seed: int,
    progress: Progress,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """KL(model || model with one layer at a setting), nat a token.

    The second-order estimate is made for the first setting of each layer. Layers of one kind in one quarter
    of the depth are then changed together, and their estimates scaled to the KL that this gives: it has what
    the estimate leaves out, common to positions and between layers. The other settings follow in proportion
    to their squared error, by column, weighted with the energy of the layer's inputs.

    Args:
        network: float32, whose parameters need no gradients.
        batches: token ids, padded at the right, and which are real: (rows, length) each.
        options: settings of each layer.
        seed: of the drawn labels.
        progress: where to say how far it is.

    Returns:
        Of each layer the KL of each setting; and of each group, true KL over the sum of the estimates.
    """
    changes: dict[str, torch.Tensor] = {}
    errors: dict[str, list[torch.Tensor]] = {}
    progress.start("settings", len(options))
    for done, (name, many) in enumerate(options.items(), 1):
        weight = _weight(network, name)
        changes[name] = (_quantised(weight, many[0]) - weight).bfloat16()
        part = weight[:: -(-len(weight) // _SAMPLE)]
        errors[name] = [(_quantised(part, one) - part).square().sum(0) for one in many]
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
    try:
        found = expected_kl(network, batches, {name: [change] for name, change in changes.items()}, seed)
    finally:
        for hook in hooks:
            hook.remove()
    scales = _corrections(network, batches, changes, {name: one for name, (one,) in found.items()}, progress)
    made = {}
    for name in options:
        shares = [float(each @ energies[name]) for each in errors[name]]
        low = found[name][0] * scales[_group(name, options)]
        made[name] = [low * share / max(shares[0], 1e-30) for share in shares]
    return made, scales


def _weight(network: nn.Module, name: str) -> torch.Tensor:
    return network.get_parameter(f"{name}.weight").data


def _quantised(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    return search(weight, layer.grid, magnitudes(weight, layer.grid)).dequantise()


def _group(name: str, options: Mapping[str, object]) -> str:
    """Layers of a kind in a part of the depth; those that share their settings are of one kind."""
    last = name.rpartition(".")[2]
    kind = next((key[0] for key in targets.SHARED if last in key), last)
    number = targets.number_of(name)
    count = 1 + max((targets.number_of(other) or 0 for other in options), default=0)
    return kind if number is None else f"{kind} {_DEPTHS * number // count + 1}/{_DEPTHS}"


def _corrections(
    network: nn.Module,
    batches: Batches,
    changes: Mapping[str, torch.Tensor],
    estimates: Mapping[str, float],
    progress: Progress,
) -> dict[str, float]:
    """Group -> true KL of changing all its layers, over the sum of their estimates."""
    checked, tokens = [], 0
    for ids, real in batches:
        if tokens < _CHECKED:
            checked.append((ids, real))
            tokens += int(real.sum())
    groups: dict[str, list[str]] = {}
    for name in changes:
        groups.setdefault(_group(name, changes), []).append(name)
    totals = dict.fromkeys(groups, 0.0)
    device = next(network.parameters()).device
    progress.start("measured KL", len(checked) * len(groups))
    with torch.inference_mode():
        for place, (ids, real) in enumerate(checked):
            own = _predicted(network, ids, real, device)
            shares = own.exp()
            for done, (group, names) in enumerate(groups.items(), 1):
                kept = {name: _weight(network, name).clone() for name in names}
                for name in names:
                    _weight(network, name).add_(changes[name])
                changed = _predicted(network, ids, real, device)
                totals[group] += float(changed.sub_(own).neg_().mul_(shares).sum())
                for name, weight in kept.items():
                    _weight(network, name).copy_(weight)
                progress.update(place * len(groups) + done)
    progress.finish()
    return {
        group: max(totals[group] / max(tokens, 1), 0.0) / max(sum(estimates[name] for name in names), 1e-30)
        for group, names in groups.items()
    }


def _predicted(
    network: nn.Module, ids: torch.Tensor, real: torch.Tensor, device: torch.device
) -> torch.Tensor:
    """(tokens, vocabulary) log probabilities."""
    logits = network(input_ids=ids.to(device), use_cache=False).logits
    return logits[real.to(device)].float().log_softmax(-1)
