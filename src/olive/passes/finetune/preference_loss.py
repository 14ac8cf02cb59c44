"""The published losses over pairs of answers. Imported only where torch already is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch.nn.functional import logsigmoid

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of answers given their prompts, in nat, float32; one pair an element.

    Attributes:
        chosen, rejected: under the model in training.
        start_chosen, start_rejected: under the reference; zero where there is none.
        chosen_tokens, rejected_tokens: tokens of the answers, float32.
    """

    chosen: Tensor
    rejected: Tensor
    start_chosen: Tensor
    start_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


class Objective(Protocol):
    """What is minimised over pairs.

    Attributes:
        has_reference: whether the log-probabilities at the start of training take part.
        learns_chosen: whether the cross entropy of the prompt and the chosen answer is added, a mean over the
            tokens of the step.
    """

    has_reference: ClassVar[bool]
    learns_chosen: ClassVar[bool]

    def losses(self, scores: Scores) -> Tensor:
        """The loss of each pair."""

    def rewards(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """The implicit reward of each chosen and of each rejected answer."""

    def logps(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """The log-probabilities that are reported: of whole answers, or means over tokens."""


@dataclass(frozen=True, slots=True)
class DPOLoss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) and its relatives.

    Attributes:
        loss_type: one of ``DPO_LOSSES``.
        beta: how strongly the reference holds; tau of ipo.
        label_smoothing: share of preferences taken to be the wrong way round, for robust and exo_pair.
    """

    has_reference: ClassVar[bool] = True
    learns_chosen: ClassVar[bool] = False
    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def losses(self, scores: Scores) -> Tensor:
        """The loss of each pair."""
        chosen, rejected = self.ratios(scores)
        if self.loss_type in ("ipo", "sigmoid_norm"):
            chosen, rejected = chosen / scores.chosen_tokens, rejected / scores.rejected_tokens
        return DPO_LOSSES[self.loss_type](chosen, rejected, self.beta, self.label_smoothing)

    def rewards(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """``beta`` times the log-ratio to the reference."""
        chosen, rejected = self.ratios(scores)
        return self.beta * chosen, self.beta * rejected

    def logps(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Of whole answers."""
        return scores.chosen, scores.rejected

    def ratios(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Log-ratios to the reference."""
        return scores.chosen - scores.start_chosen, scores.rejected - scores.start_rejected


def _robust(chosen: Tensor, rejected: Tensor, beta: float, flipped: float) -> Tensor:
    """Chowdhury et al. 2024, arXiv:2403.00409, equation 12."""
    margin = beta * (chosen - rejected)
    return ((flipped - 1) * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


def _exo(chosen: Tensor, rejected: Tensor, beta: float, epsilon: float) -> Tensor:
    """Ji et al. 2024, arXiv:2402.00856, equation 16."""
    margin = beta * (chosen - rejected)
    own, other = logsigmoid(margin), logsigmoid(-margin)
    return own.exp() * (own - math.log1p(-epsilon)) + other.exp() * (other - math.log(epsilon))


def _nca(chosen: Tensor, rejected: Tensor, beta: float, _: float) -> Tensor:
    """Chen et al. 2024, arXiv:2402.05369, for two answers."""
    good, bad = beta * chosen, beta * rejected
    return -logsigmoid(good) - 0.5 * (logsigmoid(-good) + logsigmoid(-bad))


DPO_LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "sigmoid": lambda chosen, rejected, beta, _: -logsigmoid(beta * (chosen - rejected)),
    # SimPO's length normalisation (arXiv:2405.14734) of log-ratios; the ratios come divided by lengths
    "sigmoid_norm": lambda chosen, rejected, beta, _: -logsigmoid(beta * (chosen - rejected)),
    # Zhao et al. 2023, arXiv:2305.10425
    "hinge": lambda chosen, rejected, beta, _: torch.relu(1 - beta * (chosen - rejected)),
    # Azar et al. 2023, arXiv:2310.12036, equation 17; the ratios come divided by lengths
    "ipo": lambda chosen, rejected, tau, _: (chosen - rejected - 1 / (2 * tau)).square(),
    "robust": _robust,
    "exo_pair": _exo,
    "nca_pair": _nca,
    # Jung et al. 2024, arXiv:2404.04656, without the shift
    "bco_pair": lambda chosen, rejected, beta, _: -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected),
    # Wu et al. 2024, arXiv:2405.00675, equation 4.7 with certain preferences
    "sppo_hard": lambda chosen, rejected, beta, _: (
        (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    ),
    # D'Oosterlinck et al. 2024, arXiv:2408.06266, equations 7 and 8
    "apo_zero": lambda chosen, rejected, beta, _: (
        1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    ),
    "apo_down": lambda chosen, rejected, beta, _: (
        1 + torch.sigmoid(beta * chosen) - torch.sigmoid(beta * (chosen - rejected))
    ),
}


@dataclass(frozen=True, slots=True)
class ORPOLoss:
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equations 6 and 7).

    Attributes:
        beta: weight of the odds ratio; lambda in the paper.
    """

    has_reference: ClassVar[bool] = False
    learns_chosen: ClassVar[bool] = True
    beta: float = 0.1

    def losses(self, scores: Scores) -> Tensor:
        """``-beta log sigmoid(log odds ratio)``; the trainer adds the cross entropy."""
        chosen, rejected = self.logps(scores)
        return -self.beta * logsigmoid(chosen - rejected - _log1mexp(chosen) + _log1mexp(rejected))

    def rewards(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """``beta`` times the mean log-probability of a token."""
        chosen, rejected = self.logps(scores)
        return self.beta * chosen, self.beta * rejected

    def logps(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Means over the tokens of an answer."""
        return scores.chosen / scores.chosen_tokens, scores.rejected / scores.rejected_tokens


def _log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x <= 0``, exact near both ends; finite where an answer is certain."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # where() gives both branches a gradient: keep each away from the other's pole
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
