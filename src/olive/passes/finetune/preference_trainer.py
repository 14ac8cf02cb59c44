"""Training on pairs of answers: packed log-probabilities, a reference without a second model.

Imported only where torch already is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olive.passes.finetune import batches
from olive.passes.finetune.batches import Blocks
from olive.passes.finetune.fused import Factors
from olive.passes.finetune.loss import IGNORE
from olive.passes.finetune.preference_loss import Objective, Scores
from olive.passes.finetune.trainer import PackedTrainer

REFERENCE = "reference.safetensors"
_KEYS = ("pairs", "answers", "labelled")
_SUMS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "loss", "chosen_loss", "pairs", "tokens"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A block of two documents, the chosen answer's and the rejected one's, with its place in the data.

    Attributes:
        index: among all pairs, those to evaluate on behind those to train on.
        ids, labels, lengths, rows: as of a block; the answers alone have labels.
    """

    index: int
    ids: Sequence[int]
    labels: Sequence[int]
    lengths: Sequence[int]
    rows: Sequence[str] = ()


def numbered(blocks: Blocks, first: int) -> Blocks:
    """Blocks as pairs that know their place, from ``first`` on."""
    pairs = [Pair(first + n, b.ids, b.labels, b.lengths, b.rows) for n, b in enumerate(blocks.blocks)]
    return Blocks(pairs, blocks.decode)


def collate(pairs: Sequence[Pair], *, learns_chosen: bool) -> dict[str, Any]:
    """Pairs as one packed row without padding.

    Args:
        pairs: each with two documents.
        learns_chosen: give the prompt before a chosen answer labels too.

    Returns:
        As ``batches.collate``, with ``pairs``, their places; ``answers``, bool (labels,): whether a label is
        of an answer; and ``labelled``, the number of labels in each document.
    """
    batch = batches.collate(pairs)
    answers = batch["labels"] != IGNORE
    if learns_chosen:
        whole = [Pair(p.index, p.ids, _with_prompt(p), p.lengths) for p in pairs]
        batch["labels"] = batches.collate(whole)["labels"]
    labels = batch["labels"] != IGNORE
    return batch | {
        "pairs": tuple(pair.index for pair in pairs),
        "answers": answers[labels],
        "labelled": tuple(int(part.sum()) for part in labels[0].split(batch["document_lengths"])),
    }


def _with_prompt(pair: Pair) -> list[int]:
    chosen = pair.lengths[0]
    return [*pair.ids[:chosen], *pair.labels[chosen:]]


class PreferenceTrainer(PackedTrainer):
    """Trains on pairs; the loss of a step is a mean over its pairs, however they are cut into forward passes.

    The reference of an objective is the model as it was when training began: with a fresh adapter the base,
    else the adapter gone on from. Its log-probabilities are computed by putting the trained tensors of the
    start in place for one forward pass without dropout; those of a pair are computed once.

    Args:
        model: as of ``PackedTrainer``, in the state of the start.
        args: as of ``PackedTrainer``.
        train: pairs to train on, as blocks of two documents.
        held_out: pairs to evaluate on.
        objective: what is minimised.
        more: as of ``PackedTrainer``.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        train: Blocks,
        held_out: Blocks | None,
        *,
        objective: Objective,
        **more: Any,
    ) -> None:
        self.objective = objective
        count = len(train)
        held = None if held_out is None else numbered(held_out, count)
        super().__init__(model, args, numbered(train, 0), held, **more)
        total = count + (0 if held is None else len(held))
        self.start = [p.detach().clone() for p in self.trained] if objective.has_reference else []
        self.reference = torch.full((total, 2), torch.nan, device=self.args.device)
        self.known: set[int] = set()
        self.chosen_tokens = 1
        self.sums: list[dict[str, torch.Tensor | int]] = []

    runs_ahead = False  # its figures are those of the passes since they were last asked for

    def collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:  # type: ignore[override]
        """Pairs as one packed row."""
        return collate(pairs, learns_chosen=self.objective.learns_chosen)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        pairs = [pair for batch in batch_samples for pair in batch]
        # every token but the first: where the chosen text is learnt, its prompt is too
        self.chosen_tokens = sum(pair.lengths[0] - 1 for pair in pairs)
        return len(pairs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the batch's pairs, divided by the pairs of the whole optimizer step.

        The cross entropy of chosen answers, where it takes part, is divided by their tokens in the step.
        """
        count = len(inputs["pairs"])
        start = self._reference(inputs) if self.objective.has_reference else None
        scores, chosen_loss, outputs = self._scores(model, inputs, start)
        losses = self.objective.losses(scores)
        tokens = _chosen_tokens(inputs)
        loss = losses.sum() / (num_items_in_batch or count)
        if self.objective.learns_chosen:
            loss = loss + chosen_loss / max(1, tokens if num_items_in_batch is None else self.chosen_tokens)
        self._remember(scores, losses.detach(), chosen_loss.detach(), count, tokens)
        return (loss, outputs) if return_outputs else loss

    def _scores(
        self, model: Any, inputs: Any, start: torch.Tensor | None
    ) -> tuple[Scores, torch.Tensor, Any]:
        """Scores of the pairs, and the cross entropy of the chosen texts, summed."""
        outputs = model(
            **{name: value for name, value in inputs.items() if name not in _KEYS}, olive_loss="tokens"
        )
        losses, answers, labelled = outputs.loss, inputs["answers"], inputs["labelled"]
        # sums of pieces in a fixed order: index_add would add in any on a GPU
        sums = -torch.stack([piece.sum() for piece in (losses * answers).split(labelled)])
        tokens = torch.stack([piece.sum() for piece in answers.split(labelled)]).float()
        chosen_loss = torch.stack([piece.sum() for piece in losses.split(labelled)[::2]]).sum()
        if start is None:
            start = torch.zeros(len(sums) // 2, 2, device=sums.device)
        scores = Scores(sums[::2], sums[1::2], start[:, 0], start[:, 1], tokens[::2], tokens[1::2])
        return scores, chosen_loss, outputs

    def _reference(self, inputs: Any) -> torch.Tensor:
        """(pairs, 2) log-probabilities of the chosen and the rejected answers at the start of training."""
        places = list(inputs["pairs"])
        if not self.known.issuperset(places):
            with self.at_start():
                scores, _, _ = self._scores(self.model, inputs, None)
            self.reference[places] = torch.stack([scores.chosen, scores.rejected], 1).to(self.reference)
            self.known.update(places)
        return self.reference[places]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The model as it was when training began, without gradients and dropout."""
        training, now = self.model.training, [parameter.data for parameter in self.trained]
        try:
            self._put(self.start)
            self.model.eval()
            with torch.no_grad():
                yield
        finally:
            self._put(now)
            self.model.train(training)

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.trained, values, strict=True):
            parameter.data = value
        Factors.generation += 1

    def _remember(
        self, scores: Scores, losses: torch.Tensor, chosen_loss: torch.Tensor, count: int, tokens: int
    ) -> None:
        with torch.no_grad():
            chosen, rejected = self.objective.rewards(scores)
            chosen_logps, rejected_logps = self.objective.logps(scores)
        found: dict[str, torch.Tensor | int] = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "logps/chosen": chosen_logps.sum(),
            "logps/rejected": rejected_logps.sum(),
            "loss": losses.sum(),
        }
        found |= {"chosen_loss": chosen_loss, "pairs": count, "tokens": tokens}
        # read when asked for, as the losses are
        self.sums.append({n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in found.items()})

    def figures(self) -> dict[str, float]:
        """Means over the pairs since it was last asked, by TRL's names."""
        sums, self.sums = self.sums, []
        totals = dict(zip(_SUMS, self.world.total(self._added(sums)).tolist(), strict=True))
        if not totals["pairs"]:
            return {}
        pairs, tokens, chosen_loss = (totals.pop(name) for name in ("pairs", "tokens", "chosen_loss"))
        means = {name: value / pairs for name, value in totals.items()}
        if self.objective.learns_chosen:
            means["nll_loss"] = chosen_loss / max(1.0, tokens)
            means["loss"] += means["nll_loss"]
        return means

    @staticmethod
    def _added(sums: Sequence[dict[str, torch.Tensor | int]]) -> torch.Tensor:
        added = [sum(float(each[name]) for each in sums) for name in _SUMS]
        return torch.tensor(added, dtype=torch.float64)

    def forget(self) -> None:
        """Forget the pairs of forward passes that are done again."""
        self.sums.clear()

    def checkpoint(self) -> Callable[[Path], None]:
        """As of ``PackedTrainer``, and the reference's log-probabilities that this process knows."""
        from safetensors.torch import save_file

        write = super().checkpoint()

        def into(folder: Path) -> None:
            write(folder)
            save_file({"logps": self.reference.cpu()}, folder / REFERENCE)

        return into

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        super()._load_from_checkpoint(resume_from_checkpoint, model)
        kept = load_file(Path(resume_from_checkpoint) / REFERENCE)["logps"]
        self.reference.copy_(kept)
        self.known = set((~kept.isnan().any(1)).nonzero().flatten().tolist())


def _chosen_tokens(batch: Any) -> int:
    """Tokens with a label in the chosen texts of a packed row."""
    return sum(batch["labelled"][::2])
