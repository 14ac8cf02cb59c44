"""Runs a Hugging Face model, with or without an adapter, on PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from olive.config.base import Dtype
from olive.config.workflow import Accelerator
from olive.evaluation.runners.base import Document, Runner, Tick, by_length
from olive.hardware import probe
from olive.hardware.machine import Machine
from olive.models import adapter, hf
from olive.models.artifact import Artifact, Kind

WINDOW = 512
"""Positions whose logits exist at one time: 100 MB at a vocabulary of 49,152 in float32."""


def _dtype(model: Artifact, machine: Machine, accelerator: Accelerator) -> Dtype:
    """The device's own dtype, but on a CPU no narrower than what the weights are stored in."""
    stored = (model if model.base is None else model.base).path
    if accelerator.device == "cpu" and any(code == "F32" for code, _ in hf.describe(stored).tensors.values()):
        return "float32"
    return probe.training_dtype(machine, accelerator.device)


class PytorchRunner(Runner):
    """A causal language model in PyTorch.

    Args:
        model: of kind HF or ADAPTER.
        machine: decides the dtype.
        accelerator: decides the device.
    """

    def __init__(self, model: Artifact, machine: Machine, accelerator: Accelerator) -> None:
        dtype = _dtype(model, machine, accelerator)
        self.device = "cuda" if accelerator.device == "gpu" else "cpu"
        loaded: Any
        if model.kind is Kind.ADAPTER and model.base is not None:
            loaded = adapter.load_adapter(model.base.path, model.path, dtype, self.device)
            config = loaded.get_base_model().config
        else:
            loaded = hf.load_model(model.path, dtype=dtype, device=self.device)
            config = loaded.config
        self._model = loaded.eval()
        self.vocab_size = int(config.vocab_size)
        self.context_length = int(getattr(config, "max_position_embeddings", 0) or 0)
        self.eos_ids = _ids(config.eos_token_id) | _ids(
            getattr(getattr(loaded, "generation_config", None), "eos_token_id", None)
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """Prefill once with left padding, then one token a step until every row has ended."""
        import torch

        stops = self.eos_ids | stop_ids
        answers: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        ids, mask = _left_padded(prompts, self.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = None
        with torch.inference_mode():
            for step in range(max_new_tokens):
                output = self._model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                chosen = output.logits[:, -1].argmax(-1)
                for row, token in enumerate(chosen.tolist()):
                    if row in live and token not in stops:
                        answers[row].append(token)
                    else:
                        live.discard(row)
                if not live or step + 1 == max_new_tokens:
                    break
                cache = output.past_key_values
                ids = chosen[:, None]
                mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
                positions = positions[:, -1:] + 1
        return answers

    def losses(self, documents: Sequence[Document], tick: Tick) -> list[float]:
        """Batches of similar length in windows of ``WINDOW`` positions over a cache: exact, and small."""
        found = [0.0] * len(documents)
        done = 0
        for batch in by_length([len(document.ids) for document in documents], rows=32, tokens=WINDOW):
            for index, loss in zip(batch, self._batch_losses([documents[i] for i in batch]), strict=True):
                found[index] = loss
            done += len(batch)
            tick(done)
        return found

    def _batch_losses(self, documents: list[Document]) -> list[float]:
        import torch

        width = max(len(document.ids) for document in documents)
        # Padding is on the right, behind everything that counts: causal attention never sees it.
        ids = torch.zeros(len(documents), width, dtype=torch.long)
        targets = torch.full((len(documents), width), -100)
        for row, document in enumerate(documents):
            ids[row, : len(document.ids)] = torch.tensor(document.ids)
            targets[row, : len(document.ids)] = torch.tensor(document.targets())
        ids, targets = ids.to(self.device), targets.to(self.device)
        cache = None
        totals = torch.zeros(len(documents), dtype=torch.float64)
        with torch.inference_mode():
            for start in range(0, width, WINDOW):
                part = slice(start, min(start + WINDOW, width))
                expected = targets[:, part]
                counted = (expected != -100).any(0).nonzero()[:, 0]
                output = self._model(
                    input_ids=ids[:, part],
                    past_key_values=cache,
                    use_cache=width > WINDOW,
                    logits_to_keep=counted if len(counted) else 1,
                )
                cache = output.past_key_values
                if not len(counted):
                    continue
                loss = torch.nn.functional.cross_entropy(
                    output.logits.float().flatten(0, 1), expected[:, counted].flatten(), reduction="none"
                )
                totals += loss.view(len(documents), -1).double().sum(1).cpu()
        return [float(value) for value in totals]

    def time_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Greedy steps of one sequence that no token ends."""
        import torch

        ids = torch.tensor([list(prompt)], device=self.device)
        cache = None
        times: list[float] = []
        with torch.inference_mode():
            last = perf_counter()
            for _ in range(new_tokens):
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                ids = output.logits[:, -1].argmax(-1, keepdim=True)
                ids.tolist()  # waits for the device: a token counts when it is here
                now = perf_counter()
                times.append(now - last)
                last = now
        return times

    def close(self) -> None:
        """Drop the model, and its memory with it."""
        import gc

        self._model = None
        gc.collect()


def _left_padded(prompts: Sequence[Sequence[int]], device: str) -> tuple[Any, Any]:
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else (value,))
