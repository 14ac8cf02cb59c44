"""Runs an exported model: generation on ONNX Runtime GenAI, probabilities on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from olive.config.workflow import Accelerator
from olive.errors import EnvironmentFault, PassFailed
from olive.evaluation.runners.base import Document, Runner, Tick, by_length
from olive.models.artifact import Artifact
from olive.models.genai import GenaiModel

WINDOW = 512
"""Positions whose logits exist at one time."""


class GenaiRunner(Runner):
    """A model that ModelBuilder made.

    Args:
        model: of kind GENAI.
        accelerator: its execution provider runs the model; there is no fallback to another.
    """

    def __init__(self, model: Artifact, accelerator: Accelerator) -> None:
        self._provider = accelerator.execution_provider
        self._model = GenaiModel(model.path, self._provider)
        self._session: Any = None
        self.vocab_size = self._model.vocab_size
        self.context_length = self._model.context_length
        self.eos_ids = self._model.eos_ids

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """One batch, padded so that every answer is the one its prompt gets alone."""
        return self._model.generate_batch(prompts, max_new_tokens, stop_ids)

    def time_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Greedy steps of one sequence that no token ends."""
        return self._model.time_tokens(prompt, new_tokens)

    def losses(self, documents: Sequence[Document], tick: Tick) -> list[float]:
        """Documents of one length share a batch; one longer than ``WINDOW`` goes alone, window by window."""
        found = [0.0] * len(documents)
        done = 0
        lengths = [len(document.ids) for document in documents]
        for batch in by_length(lengths, rows=32, tokens=WINDOW, equal=True):
            for index, loss in zip(batch, self._batch_losses([documents[i] for i in batch]), strict=True):
                found[index] = loss
            done += len(batch)
            tick(done)
        return found

    def _batch_losses(self, documents: list[Document]) -> list[float]:
        import numpy as np

        session = self._open()
        ids = np.array([document.ids for document in documents], dtype=np.int64)
        targets = np.array([document.targets() for document in documents], dtype=np.int64)
        rows, width = ids.shape
        past = self._empty_past(rows)
        outputs = [output.name for output in session.get_outputs()]
        wanted = {value.name for value in session.get_inputs()}
        totals = np.zeros(rows)
        # GroupQueryAttention takes several positions over a past only in a batch of one: see by_length
        for start in range(0, width, WINDOW):
            stop = min(start + WINDOW, width)
            feed = {
                "input_ids": ids[:, start:stop],
                "attention_mask": np.ones((rows, stop), dtype=np.int64),
                "position_ids": np.broadcast_to(np.arange(start, stop, dtype=np.int64), (rows, stop - start)),
            }
            feed = {name: value for name, value in feed.items() if name in wanted} | past
            results = dict(zip(outputs, session.run(None, feed), strict=True))
            totals += _loss(results.pop("logits"), targets[:, start:stop])
            past = {name.replace("present", "past_key_values", 1): value for name, value in results.items()}
        return [float(value) for value in totals]

    def _empty_past(self, rows: int) -> dict[str, Any]:
        import numpy as np

        decoder = self._model.config["decoder"]
        shape = (rows, decoder["num_key_value_heads"], 0, decoder["head_size"])
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past: dict[str, Any] = {}
        for value in self._open().get_inputs():
            if value.name.startswith("past_key_values."):
                if value.type not in dtypes:
                    raise EnvironmentFault(
                        f"perplexity of a model whose cache is {value.type} cannot be measured here",
                        fix="Measure an fp32, fp16 or int4 export, or leave perplexity out for this step.",
                    )
                past[value.name] = np.zeros(shape, dtype=dtypes[value.type])
        return past

    def _open(self) -> Any:
        if self._session is None:
            import onnxruntime as ort

            if self._provider not in ort.get_available_providers():
                available = ", ".join(ort.get_available_providers())
                raise EnvironmentFault(
                    f"{self._provider} was asked for; this onnxruntime has {available}",
                    fix="Install the onnxruntime package that has it, or change the target's accelerator.",
                )
            path = self._model.folder / self._model.config["decoder"]["filename"]
            options = ort.SessionOptions()
            options.log_severity_level = 3
            self._session = ort.InferenceSession(path, options, providers=[self._provider])
            # A provider that fails to start is replaced by the CPU with no more than a line in the log.
            if self._provider not in self._session.get_providers():
                raise EnvironmentFault(
                    f"{self._provider} did not start here; onnxruntime fell back to the CPU",
                    fix="Check the device's driver with `olive doctor`, or change the target's accelerator.",
                )
            names = {output.name for output in self._session.get_outputs()}
            if "logits" not in names:
                raise PassFailed(
                    f"{path.name} has no output called logits", fix="Export it with ModelBuilder."
                )
        return self._session

    def close(self) -> None:
        """Drop both sessions."""
        import gc

        self._session = None
        self._model = None  # type: ignore[assignment]
        gc.collect()


def _loss(logits: Any, targets: Any) -> Any:
    """Sum over positions of -log softmax(logits)[target]; float64 sums, targets of -100 do not count."""
    import numpy as np

    logits = logits.astype(np.float32, copy=False)
    top = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1, dtype=np.float64)) + top[..., 0]
    picked = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.where(targets == -100, 0.0, log_sum - picked).sum(-1)
