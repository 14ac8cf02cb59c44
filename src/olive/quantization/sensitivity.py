"""How much a changed weight matrix moves a model's predictions. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn


def expected_kl(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    changes: Mapping[str, Sequence[torch.Tensor]],
    seed: int = 0,
) -> dict[str, list[float]]:
    """Second-order estimate of KL(model || changed model) a token, one matrix changed at a time.

    KL is half the quadratic form of the Fisher matrix, an expectation over labels drawn from the model's own
    predictions (Martens 2020, section 5). With x the input of a layer at a position, g the gradient of the
    drawn labels' log probability by its output, and D the change: the mean of (g . D x)^2 / 2 over
    positions, leaving out what positions have in common. One forward and one backward pass for all layers.

    Args:
        model: whose parameters need no gradients.
        batches: token ids, padded at the right, and which are real: (rows, length) each.
        changes: name of a linear layer -> candidates of changed minus own weight, (out, in).
        seed: of the drawn labels.

    Returns:
        Of each layer, the estimate for each candidate, in nat.
    """
    device = next(model.parameters()).device
    totals = {name: [0.0] * len(many) for name, many in changes.items()}
    generator = torch.Generator(device).manual_seed(seed)
    tokens = 0

    def arrived(name: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        for place, change in enumerate(changes[name]):
            moved = inputs @ change.to(inputs.dtype).T
            totals[name][place] += float((moved * gradient).sum(-1).square().sum())

    def entered(name: str, _: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(partial(arrived, name, given[0].detach()))

    hooks = [model.get_submodule(name).register_forward_hook(partial(entered, name)) for name in changes]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hooks.append(embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_()))
    try:
        for ids, real in batches:
            logits = model(input_ids=ids.to(device), use_cache=False).logits.float()
            kept = logits.log_softmax(-1)[real.to(device)]
            drawn = torch.multinomial(kept.detach().exp(), 1, generator=generator)
            kept.gather(1, drawn).sum().backward()
            tokens += len(drawn)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: [total / (2 * max(tokens, 1)) for total in many] for name, many in totals.items()}
