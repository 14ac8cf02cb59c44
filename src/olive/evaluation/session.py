"""What the metrics of one evaluation share: the rows, the tokenizer, the loaded model, the clock runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from olive.config.workflow import Accelerator, DataConfig, Metric
from olive.data import rows as data_rows
from olive.data import template, tokens
from olive.errors import ConfigError
from olive.evaluation.runners.base import Runner
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind
from olive.passes.base import Progress


@dataclass(frozen=True, slots=True)
class Measured:
    """What a metric found for one of its numbers.

    Attributes:
        value: the number, in the unit of the catalog.
        count: samples behind it.
        spread: half-width of its 95 % interval, same unit.
    """

    value: float
    count: int
    spread: float | None = None


@dataclass(slots=True)
class Timing:
    """Seconds of every token of every counted run; the first token of a run includes the prompt."""

    runs: list[list[float]] = field(default_factory=list)


class Session:
    """One model under evaluation; what is costly is made on first use and shared.

    Args:
        model: the artifact.
        data: name -> data config.
        base_dir: folder of relative data paths.
        machine: this machine.
        accelerator: where the model runs.
        progress: where to say how far it is.
    """

    def __init__(
        self,
        model: Artifact,
        *,
        data: Mapping[str, DataConfig],
        base_dir: Path,
        machine: Machine,
        accelerator: Accelerator,
        progress: Progress,
    ) -> None:
        self.model = model
        self.progress = progress
        self._data = data
        self._base_dir = base_dir
        self._machine = machine
        self._accelerator = accelerator
        self._runner: Runner | None = None
        self._timings: dict[tuple[str | None, int, int, int, int], Timing] = {}

    @cached_property
    def tokenizer(self) -> tokens.LightTokenizer:
        """The model's own tokenizer; an adapter uses its base's."""
        base = self.model.base
        return tokens.load(base.path if base is not None else self.model.path)

    @property
    def runner(self) -> Runner:
        """The model, loaded."""
        if self._runner is None:
            self._runner = _open(self.model, self._machine, self._accelerator)
        return self._runner

    def config(self, metric: Metric) -> DataConfig:
        """The data config that ``metric`` names."""
        found = self._data.get(metric.data_config or "")
        if found is None:
            raise ConfigError(
                f"metric {metric.name!r} needs a data_config"
                if metric.data_config is None
                else f"metric {metric.name!r} names data config {metric.data_config!r}, which does not exist",
                fix=f"data configs here: {', '.join(self._data) or 'none'}",
            )
        return found

    def rows(self, metric: Metric) -> list[dict[str, Any]]:
        """The rows of the metric's data, at most its ``max_samples``."""
        return data_rows.read(self.config(metric), self._base_dir, metric.max_samples)

    def timing(self, metric: Metric) -> Timing:
        """Counted runs of one sequence; metrics with the same settings share them."""
        key = (metric.data_config, metric.prompt_tokens, metric.new_tokens, metric.warmup, metric.repeat)
        if key not in self._timings:
            prompt = self._prompt(metric)
            timing = Timing()
            self.progress.start(f"evaluate {metric.name}", metric.warmup + metric.repeat)
            for index in range(metric.warmup + metric.repeat):
                seconds = self.runner.time_tokens(prompt, metric.new_tokens)
                if index >= metric.warmup:
                    timing.runs.append(seconds)
                self.progress.update(index + 1, tokens_per_second=len(seconds) / sum(seconds))
            self.progress.finish()
            self._timings[key] = timing
        return self._timings[key]

    def _prompt(self, metric: Metric) -> list[int]:
        """Exactly ``prompt_tokens`` ids: the data's own where it is named, else fixed random ones."""
        context = self.runner.context_length
        if context and metric.prompt_tokens + metric.new_tokens > context:
            raise ConfigError(
                f"metric {metric.name!r}: {metric.prompt_tokens} prompt and {metric.new_tokens} new tokens "
                f"are beyond the model's context of {context}",
                fix="Lower prompt_tokens or new_tokens.",
            )
        if metric.data_config is not None:
            pre = self.config(metric).pre_process_data_config
            texts = template.render_all(pre, self.rows(metric), self.tokenizer.chat)
            ids: list[int] = []
            for text in texts:
                ids += self.tokenizer.encode_prompt(text, pre) or self.tokenizer.encode(text.full)
                if len(ids) >= metric.prompt_tokens:
                    return ids[: metric.prompt_tokens]
            if ids:
                return (ids * (metric.prompt_tokens // len(ids) + 1))[: metric.prompt_tokens]
        draw = random.Random(0)  # noqa: S311 - a workload, not a secret
        return [draw.randrange(self.tokenizer.vocab_size) for _ in range(metric.prompt_tokens)]

    def close(self) -> None:
        """Free the model."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None


def _open(model: Artifact, machine: Machine, accelerator: Accelerator) -> Runner:
    if model.kind in (Kind.HF, Kind.ADAPTER, Kind.GGUF):
        from olive.evaluation.runners.pytorch import PytorchRunner

        return PytorchRunner(model, machine, accelerator)
    if model.kind is Kind.GENAI:
        from olive.evaluation.runners.genai import GenaiRunner

        return GenaiRunner(model, accelerator)
    raise ConfigError(
        f"a model of kind {model.kind.value} cannot be evaluated",
        fix="Evaluate a Hugging Face model, an adapter, or what ModelBuilder makes.",
    )
