"""Distances between the next-token distributions of two models."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LONGEST = 256
_CELLS = 4 << 20  # logits compared at once
_KEPT = 256 << 20  # bytes of reference logits held at once
_BATCH = 128 << 20  # bytes of logits that one forward pass makes
_REMEMBERED = 64 << 20  # bytes of logits held from one gate to the next


@dataclass(slots=True)
class Comparison:
    """Running figures over the positions of all prompts; p is the reference.

    Attributes:
        positions: compared so far.
        kl_sum: of KL(p || q), nat.
        kl_max: worst position, nat.
        agreed: positions where both have the same most likely token.
        bad: positions of q with NaN or infinity.
        entropy: sums of the entropies of p and q, as a share of ln(vocabulary).
    """

    positions: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agreed: int = 0
    bad: int = 0
    entropy: tuple[float, float] = (0.0, 0.0)

    @property
    def kl(self) -> float:
        """Mean KL(p || q), nat a token."""
        return self.kl_sum / max(self.positions - self.bad, 1)

    @property
    def top1(self) -> float:
        """Share of positions where the most likely token agrees."""
        return self.agreed / max(self.positions, 1)

    def flatness(self, which: int) -> float:
        """Mean entropy of p (0) or q (1) as a share of ln(vocabulary); 1 is no opinion at all."""
        return self.entropy[which] / max(self.positions - self.bad, 1)

    @property
    def figures(self) -> dict[str, float]:
        """What a gate's result says of it."""
        return {
            "kl": self.kl,
            "kl_worst_position": self.kl_max,
            "top1": self.top1,
            "positions": float(self.positions),
            "flatness": self.flatness(1),
            "flatness_source": self.flatness(0),
        }

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare one prompt.

        Args:
            reference: logits of p, (positions, vocabulary), any floating dtype.
            logits: of q, same shape. Computed in float64.
        """
        rows = max(1, _CELLS // max(reference.shape[-1], 1))
        for start in range(0, len(reference), rows):
            self._add(reference[start : start + rows].double(), logits[start : start + rows].double())

    def _add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        self.positions += len(reference)
        sound = logits.isfinite().all(-1)
        self.bad += int((~sound).sum())
        p, q = reference[sound].log_softmax(-1), logits[sound].log_softmax(-1)
        if not len(p):
            return
        shares = p.exp()
        entropy = -(shares * p).sum(-1)
        kl = (-entropy - (shares * q).sum(-1)).clamp(min=0)
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        scale = math.log(p.shape[-1])
        self.entropy = (
            self.entropy[0] + float(entropy.sum()) / scale,
            self.entropy[1] - float((q.exp() * q).sum()) / scale,
        )


def torch_logits(model: Any, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits of a transformers model, one (positions, vocabulary) float32 tensor a prompt.

    Prompts go through together, filled up at their end, where no real token looks. Of many or wide ones only
    the last positions of each prompt are kept, 256 MiB together.
    """
    import torch

    device = next(model.parameters()).device
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch in _batches(prompts, int(model.config.get_text_config().vocab_size)):
            longest = max(map(len, batch))
            ids = torch.tensor([[*row, *row[-1:] * (longest - len(row))] for row in batch], device=device)
            logits = model(input_ids=ids, use_cache=False).logits
            kept = max(1, _KEPT // (4 * logits.shape[-1] * len(prompts)))
            found += [
                own[max(0, len(row) - kept) : len(row)].to("cpu", torch.float32, copy=True)
                for own, row in zip(logits, batch, strict=True)
            ]
    return found


def _batches(prompts: Sequence[list[int]], vocabulary: int) -> Iterator[Sequence[list[int]]]:
    """Runs of prompts whose logits, filled up, take at most 128 MiB; one alone may take more."""
    rows = max(1, _BATCH // (4 * vocabulary))
    start = 0
    while start < len(prompts):
        stop = start + 1
        while stop < len(prompts) and (stop + 1 - start) * max(map(len, prompts[start : stop + 1])) <= rows:
            stop += 1
        yield prompts[start:stop]
        start = stop


class References:
    """Logits of the model that a gate ran last, so that the next one need not load and run it again."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._prompts: list[list[int]] = []
        self._logits: list[torch.Tensor] = []

    def keep(self, folder: Path, prompts: list[list[int]], logits: list[torch.Tensor]) -> None:
        """Remember float32 logits of the model in ``folder``, unless they are large."""
        if sum(4 * part.numel() for part in logits) <= _REMEMBERED:
            self._folder, self._prompts, self._logits = folder, prompts, logits

    def moved(self, old: Path, new: Path) -> None:
        """The model in ``old`` is in ``new`` now, unchanged."""
        if self._folder == old:
            self._folder = new

    def take(self, folder: Path, prompts: list[list[int]]) -> list[torch.Tensor] | None:
        """Hand over what is remembered of these prompts on this model; nothing is kept after that."""
        found = self._logits if (self._folder, self._prompts) == (folder, prompts) else None
        self._folder, self._prompts, self._logits = None, [], []
        return found


def compare(
    reference: Iterable[torch.Tensor],
    logits: Iterable[torch.Tensor],
) -> Comparison:
    """Compare logits prompt by prompt.

    Where one side has fewer positions (some models give the last one alone), the last ones are compared.
    """
    result = Comparison()
    for expected, found in zip(reference, logits, strict=True):
        positions = min(len(expected), len(found))
        result.add(expected[-positions:], found[-positions:])
    return result


def probes(prompts: list[list[int]], vocabulary: int, limit: int = 8) -> list[list[int]]:
    """The prompts to compare on: at most ``limit`` of the document's, cut to 256 tokens each.

    Without any, four of 24 random tokens: they exercise every weight, though they are no real text.
    """
    chosen = [ids[:LONGEST] for ids in prompts[:limit] if ids]
    if chosen:
        return chosen
    draw = random.Random(0)  # noqa: S311 - no secret: the same probes in every run
    return [[draw.randrange(vocabulary) for _ in range(24)] for _ in range(4)]
