"""Blocks to packed batches, in an order that follows seed and epoch alone. Imported where torch is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from olive.passes.finetune.loss import IGNORE

_WORDS = 24  # tokens shown of a row
_TOLD = 8  # rows named in a message


class TokenBlock(Protocol):
    """One row to train on (``olive.data.blocks.Block``).

    Attributes:
        ids: token ids.
        labels: ids to learn, -100 where there is nothing to learn.
        lengths: tokens of each document in it.
        rows: how messages name the row that each document begins with.
    """

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def labels(self) -> Sequence[int]:
        """Ids to learn, -100 elsewhere."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each document."""

    @property
    def rows(self) -> Sequence[str]:
        """Name of each document's row."""


class Blocks(torch.utils.data.Dataset[Any]):
    """Blocks as a dataset.

    Args:
        blocks: the blocks.
        decode: token ids to text, for messages.

    Attributes:
        sizes: tokens of each.
    """

    def __init__(
        self, blocks: Sequence[TokenBlock], decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        self.blocks, self.decode = blocks, decode
        self.sizes: Sequence[int] = getattr(blocks, "sizes", None) or [len(block.ids) for block in blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> TokenBlock:
        return self.blocks[index]


def told(blocks: Iterable[TokenBlock], decode: Callable[[Sequence[int]], str] | None) -> str:
    """Which rows blocks are made of, for a message: their names and first words."""
    said = []
    for block in blocks:
        start = 0
        for length, row in zip(block.lengths, block.rows, strict=False):
            words = decode(block.ids[start : start + min(length, _WORDS)]) if decode else ""
            said.append(row + (f" ({' '.join(words.split())[:60]!r} ...)" if words else ""))
            start += length
    return ", ".join(said[:_TOLD]) + (f" and {len(said) - _TOLD} more" if len(said) > _TOLD else "")


def targets(block: TokenBlock) -> list[int]:
    """For each token, the label of the token after it in the same document; -100 for a document's last."""
    shifted: list[int] = []
    start = 0
    for length in block.lengths:
        shifted += [*block.labels[start + 1 : start + length], IGNORE]
        start += length
    return shifted


def labelled(block: TokenBlock) -> int:
    """How many positions carry a loss."""
    return sum(label != IGNORE for label in targets(block))


def collate(blocks: Sequence[TokenBlock]) -> dict[str, Any]:
    """Blocks as one packed row without padding.

    Returns:
        ``input_ids``, ``position_ids`` (restarting at each document) and ``labels`` (already those of the
        next token), all (1, tokens), and ``document_lengths``.
    """
    lengths = tuple(length for block in blocks for length in block.lengths)
    ids = [token for block in blocks for token in block.ids]
    wanted = [label for block in blocks for label in targets(block)]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.tensor([wanted]),
        "document_lengths": lengths,
    }


class Order(torch.utils.data.Sampler[int]):
    """The order of an epoch.

    Args:
        lengths: tokens of each row.
        strategy: ``random``, ``sequential``, or one that groups rows of like length.
        seed: of the order.
        group: rows of an optimizer step.
    """

    def __init__(self, lengths: Sequence[int], strategy: str, seed: int, group: int) -> None:
        self.lengths, self.strategy, self.seed, self.group = list(lengths), strategy, seed, group
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        count = len(self.lengths)
        if self.strategy == "sequential":
            return iter(range(count))
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order: list[int] = torch.randperm(count, generator=generator).tolist()
        if self.strategy not in ("group_by_length", "batch_rebalance"):
            return iter(order)
        # as transformers does: sort inside random windows of many steps, longest row first
        window = max(1, min(50, count // max(1, 4 * self.group))) * self.group
        pieces = [
            sorted(order[start : start + window], key=lambda i: -self.lengths[i])
            for start in range(0, count, window)
        ]
        grouped = [index for piece in pieces for index in piece]
        longest = max(range(count), key=lambda place: self.lengths[grouped[place]])
        grouped[0], grouped[longest] = grouped[longest], grouped[0]
        return iter(grouped)
