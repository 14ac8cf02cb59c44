"""Learn rotations by what the rounded model predicts: SpinQuant's aim on the orthogonal group. Needs torch.

SpinQuant (Liu et al. 2024, arXiv:2405.16406). The weights are folded, turned and rounded; the loss is the KL
between what the model in floating point predicts and what this one does. Its gradient by a turned weight
passes straight through the rounding, goes on to the rotations, and moves them along the group by Cayley's
transform (Li et al. 2020, arXiv:2002.01113), so that they stay orthogonal.

A rotation R moves to ``R C`` with ``C`` the transform of a skew-symmetric matrix, whose steepest direction is
the skew part of ``R^T dL/dR``. Of a matrix turned to ``W = F R``, with gradient G, that is ``W^T G``, and
``W G^T`` of ``W = R^T F``: neither F nor R is needed. The turned weights follow as ``W C`` and ``C^T W``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from olive.passes.quantize.forward import Stop
from olive.passes.quantize.residual import Fold, Stream
from olive.passes.quantize.rotated import Rotations
from olive.quantization.grid import Grid, round_to_nearest
from olive.quantization.rotations import Rotation, cayley, largest_angle
from olive.quantization.rounding import pull_back

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and which are real, (rows, length) each
_MOMENTUM, _SQUARES, _DAMPING = 0.9, 0.99, 1e-3


class RotatedNetwork:
    """A model that runs with its weights turned and rounded, and gives gradients of rotations.

    Args:
        model: float32, in evaluation mode; it takes the weights given from now on.
        weights: every tensor with norms folded and nothing turned, float32.
        stream: of the model.
        grids: names of the matrices to round, and how.
        start: where the rotations begin.
    """

    def __init__(
        self,
        model: Any,
        weights: Mapping[str, torch.Tensor],
        stream: Stream,
        grids: Mapping[str, Grid],
        start: Rotations,
    ) -> None:
        self.model, self.stream, self.grids = model.requires_grad_(False), stream, grids
        self.device = next(model.parameters()).device
        self.first = start.stream.matrix().to(self.device)
        self.heads = torch.stack([one.matrix() for one in start.heads]).to(self.device)
        self.head: nn.Module = model.get_output_embeddings()
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head.weight = nn.Parameter(weights["lm_head.weight"].to(self.device), requires_grad=False)
        self.folds = {
            name: fold
            for name, fold in stream.folds.items()
            if fold.layer >= 0 and (fold.reads or fold.writes or fold.values is not None)
        }
        self.parameters = {name: model.get_parameter(name) for name in self.folds}
        for name, value in weights.items():
            if name != "lm_head.weight":
                model.get_parameter(name).data = value.to(self.device)
        self.turned = {name: parameter.data for name, parameter in self.parameters.items()}

    def references(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """What the head reads, of each batch, before anything is turned: (rows, length, hidden)."""
        found: list[torch.Tensor] = []

        def enter(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            found.append(given[0])
            raise Stop

        hook = self.head.register_forward_pre_hook(enter)
        with torch.no_grad():
            for ids, _real in batches:
                with suppress(Stop):
                    self.model(input_ids=ids.to(self.device), use_cache=False)
        hook.remove()
        return found

    @torch.no_grad()
    def turn(self, first: torch.Tensor, heads: torch.Tensor) -> None:
        """Turn every weight on by ``first`` and each layer's of ``heads``, float64, and round it."""
        one, others = first.float(), heads.float()
        for name, fold in self.folds.items():
            value = turned_on(fold, self.turned[name], one, others[fold.layer], self.stream.head)
            self.turned[name], grid = value, self.grids.get(name)
            self.parameters[name].data = value if grid is None else round_to_nearest(value, grid).dequantise()

    def losses(self, batch: Batch, reference: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """KL(model || turned and rounded model) at each real token, nat.

        Args:
            batch: token ids and which are real.
            reference: what the head reads in the model as it is.
            first: R1 in float32, which the stream's two ends are turned by.
        """
        ids, real = (each.to(self.device) for each in batch)
        with self._ends(first, reference):
            logits = self.model(input_ids=ids, use_cache=False).logits
        got, wanted = logits[: len(ids)][real], logits[len(ids) :][real].detach()
        q, p = got.float().log_softmax(-1), wanted.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    @contextmanager
    def _ends(self, first: torch.Tensor, reference: torch.Tensor) -> Iterator[None]:
        """Embeddings are turned when they are looked up; the head reads the stream turned back.

        The head reads the reference behind it, so that what comes after the head is the same for both.
        """

        def looked_up(_: nn.Module, __: object, made: torch.Tensor) -> torch.Tensor:
            return made @ first

        def read(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (torch.cat([given[0] @ first.T, reference]),)

        hooks = (
            self.embedding.register_forward_hook(looked_up),
            self.head.register_forward_pre_hook(read),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def loss(self, batches: Sequence[Batch], references: Sequence[torch.Tensor]) -> float:
        """Mean KL over all real tokens, nat, with the weights as they are now."""
        first = self.first.float()
        parts = [
            self.losses(batch, reference, first) for batch, reference in zip(batches, references, strict=True)
        ]
        return float(torch.cat(parts).mean(dtype=torch.float64))

    def directions(self, batch: Batch, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """``R^T dL/dR`` of R1 and of every R2, float64, L the mean KL; and L."""
        first = self.first.float().requires_grad_()
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        loss = self.losses(batch, reference, first).mean()
        loss.backward()
        assert first.grad is not None  # noqa: S101 - embedding and head read it
        by_first = self.first.T @ first.grad.double()
        by_heads = torch.zeros_like(self.heads)
        for name, fold in self.folds.items():
            parameter, value = self.parameters[name], self.turned[name]
            gradient, parameter.grad = parameter.grad, None
            parameter.requires_grad_(False)
            if gradient is None:
                continue
            grid = self.grids.get(name)
            if grid is not None:
                gradient = pull_back(value, grid, gradient)
            width = self.stream.head
            if fold.values is not None:
                own, its = (
                    each[slice(*fold.values)].reshape(-1, width, *each.shape[1:])
                    for each in (value, gradient)
                )
                by_heads[fold.layer] += torch.einsum("hi...,hj...->ij", own, its).double()
            if fold.mixes:
                own, its = (each.reshape(-1, width) for each in (value, gradient))
                by_heads[fold.layer] += (own.T @ its).double()
            if fold.reads:
                by_first += (value.T @ gradient).double()
            elif fold.writes:
                own, its = (each.view(len(each), -1) for each in (value, gradient))
                by_first += (own @ its.T).double()
        return by_first, by_heads, float(loss.detach())


def turned_on(
    fold: Fold, value: torch.Tensor, first: torch.Tensor, second: torch.Tensor, head: int
) -> torch.Tensor:
    """A tensor turned by R1 and R2, as ``rotated.turned``; once more where it is turned already."""
    if value.dim() == 1:
        if fold.writes:
            return value @ first
        if fold.values is None:
            return value
        low, high = fold.values
        own = (value[low:high].view(-1, head) @ second).view(-1)
        return torch.cat([value[:low], own, value[high:]])
    if fold.writes:
        if fold.mixes:
            value = (value.view(len(value), -1, head) @ second).view(value.shape)
        return first.T @ value
    value = value @ first
    if fold.values is None:
        return value
    low, high = fold.values
    heads = value[low:high].view(-1, head, value.shape[1])
    return torch.cat([value[:low], (second.T @ heads).view(high - low, -1), value[high:]])


class Descent:
    """Directions along the group, each element scaled as in Adam.

    The skew part of ``R^T dL/dR`` stays skew-symmetric in its running mean and, element by element, in the
    quotient by the root of its running mean square.

    Args:
        shape: (..., n, n) of the rotations.
        device: theirs.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.mean = torch.zeros(shape, dtype=torch.float64, device=device)
        self.square = torch.zeros(shape, dtype=torch.float64, device=device)
        self.count = 0

    def step(self, direction: torch.Tensor, rate: float) -> torch.Tensor:
        """What the rotations are turned on by, from the right: no further than by ``rate``, in radians."""
        self.count += 1
        skew = (direction - direction.mT) / 2
        self.mean.lerp_(skew, 1 - _MOMENTUM)
        self.square.lerp_(skew.square(), 1 - _SQUARES)
        root = (self.square / (1 - _SQUARES**self.count)).sqrt()
        root = root + _DAMPING * root.amax((-1, -2), keepdim=True) + 1e-30
        skew = self.mean / (1 - _MOMENTUM**self.count) / root
        return cayley(skew * (rate / largest_angle(skew).clamp(min=1e-30)[..., None, None]))


def learn(
    network: RotatedNetwork,
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    *,
    steps: int,
    rate: float,
    checks: int,
    say: Callable[[int, float, float | None], None],
) -> tuple[Rotations, list[tuple[int, float]]]:
    """Move the rotations; those of least loss on the rows held out are kept, the start among them.

    Args:
        network: at its start.
        batches: one a step, in turn.
        held_out: rows that no step sees.
        steps: how many; the angle of a step falls to 0 over them, linearly.
        rate: angle of the first step in radians.
        checks: how often the loss of the rows held out is measured, after the start.
        say: called after each step with its number, its loss, and the held-out loss where it was measured.

    Returns:
        The rotations, and (step, held-out loss) of each measurement.
    """
    references, unseen = network.references(batches), network.references(held_out)
    by_first = Descent(network.first.shape, network.device)
    by_heads = Descent(network.heads.shape, network.device)
    network.turn(network.first, network.heads)
    curve = [(0, network.loss(held_out, unseen))]
    least, kept = curve[0][1], (network.first, network.heads)
    every = -(-steps // checks)
    for number in range(steps):
        place = number % len(batches)
        first, heads, value = network.directions(batches[place], references[place])
        now = rate * (1 - number / steps)
        turn = by_first.step(first, now), by_heads.step(heads, now)
        network.first, network.heads = network.first @ turn[0], network.heads @ turn[1]
        network.turn(*turn)
        found = None
        if (number + 1) % every == 0 or number + 1 == steps:
            found = network.loss(held_out, unseen)
            curve.append((number + 1, found))
            if found < least:
                least, kept = found, (network.first, network.heads)
        say(number + 1, value, found)
    first, heads = (each.cpu() for each in kept)
    return Rotations(Rotation(first), [Rotation(one) for one in heads]), curve
