"""The contract of a runner, and how work is cut into batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens whose probability is asked for.

    Attributes:
        ids: token ids.
        labels: the same ids, -100 where a token does not count; ``labels[0]`` never counts.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    def targets(self) -> list[int]:
        """Position -> the token that should follow it, or -100."""
        return [*self.labels[1:], -100]

    @property
    def counted(self) -> int:
        """Tokens that count."""
        return sum(label != -100 for label in self.labels[1:])


class Runner(ABC):
    """A loaded model.

    Attributes:
        vocab_size: token ids are below this.
        context_length: longest sequence it takes; 0 when unknown.
        eos_ids: tokens at which it ends an answer.
    """

    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """Continue one batch of prompts greedily; the token that ends an answer is left out."""

    @abstractmethod
    def losses(self, documents: Sequence[Document], tick: Tick) -> list[float]:
        """Negative log-likelihood of each document's counted tokens, in nat; float32 or better."""

    @abstractmethod
    def time_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Seconds for each new token of one sequence; the first one includes the prompt."""

    def close(self) -> None:  # noqa: B027 - nothing to free is a fine answer
        """Free the model."""


def by_length(lengths: Sequence[int], *, rows: int, tokens: int, equal: bool = False) -> Iterator[list[int]]:
    """Cut ``range(len(lengths))`` into batches of similar length, longest first.

    Args:
        lengths: of each item, in tokens.
        rows: most items in a batch.
        tokens: most tokens in a batch, padding included; one longer item still is a batch.
        equal: only items of one length share a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        if batch:
            widest = lengths[batch[0]]
            full = len(batch) >= rows or widest * (len(batch) + 1) > tokens
            if full or (equal and lengths[index] != widest):
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch
