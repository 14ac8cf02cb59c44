"""Calibration: rows of tokens whose activations say which errors matter."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import DataConfig
from olive.data.plan import Preview
from olive.errors import ConfigError, Problem
from olive.models.artifact import Artifact
from olive.passes.base import PassContext
from olive.passes.quantize.targets import QuantizeParams

if TYPE_CHECKING:
    import torch

MINIMUM, ENOUGH = 256, 4096
PER_BATCH = 1 << 15  # tokens run at once on a CPU


class DataParams(PassParams):
    """The rows that a pass looks at."""

    data_config: str | None = Field(
        None,
        description="Data to calibrate on. Default: what the model was fine-tuned on, in its template.",
        json_schema_extra={"reference": "data_configs", "inherits": "train_data_config"},
    )
    calibration_tokens: int = Field(
        16_384,
        ge=MINIMUM,
        description="Tokens to calibrate on; rows are drawn at random until there are as many.",
    )
    seed: int = Field(0, description="Of the draw.")


class CalibrationParams(DataParams, QuantizeParams):
    """Settings of the passes that look at activations."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows of tokens.

    Attributes:
        rows: token ids of each row.
        tokens: in all rows.
    """

    rows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return sum(map(len, self.rows))

    def batches(self, limit: int = PER_BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of similar length together: ids, padded at the right, and which of them are real.

        A causal model does not see what comes after a token, so that padding there changes nothing.
        """
        import torch

        ordered = sorted(self.rows, key=len, reverse=True)
        made, start = [], 0
        while start < len(ordered):
            width = len(ordered[start])
            count = max(1, limit // width)
            part = ordered[start : start + count]
            # rows of half the length would waste half of the work
            part = [row for row in part if 2 * len(row) > width or len(part) == 1]
            ids = torch.zeros(len(part), width, dtype=torch.long)
            real = torch.zeros(len(part), width, dtype=torch.bool)
            for place, row in enumerate(part):
                ids[place, : len(row)] = torch.tensor(row)
                real[place, : len(row)] = True
            made.append((ids, real))
            start += len(part)
        return made


def of(params: DataParams, model: Artifact, ctx: PassContext) -> Calibration:
    """The rows that the parameters of a pass ask for: kept for every step that asks for the same."""
    import torch

    config = ctx.data[params.data_config or ""]

    def compute() -> dict[str, torch.Tensor]:
        rows = read(config, model.path, ctx.base_dir, params.calibration_tokens, params.seed).rows
        ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
        return {"ids": ids, "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32)}

    found = ctx.statistics.of("rows", drawn(params), compute, data=config.name)
    parts = found["ids"].split(found["lengths"].tolist())
    return Calibration(tuple(tuple(part.tolist()) for part in parts))


def drawn(params: DataParams) -> dict[str, int]:
    """What rows depend on beside data and tokenizer."""
    return {"tokens": params.calibration_tokens, "seed": params.seed}


def read(config: DataConfig, folder: Path, base_dir: Path, tokens: int, seed: int) -> Calibration:
    """Draw rows from a data config until they have ``tokens`` tokens; the last one is cut.

    Documents are kept apart as the data config's strategy does: a packed block gives its documents.

    Raises:
        ConfigError: the data cannot be read, or has fewer tokens than any calibration needs.
    """
    from olive.data import blocks
    from olive.data import rows as data_rows
    from olive.data import tokens as data_tokens

    made = blocks.build(
        data_rows.read(config, base_dir), config.pre_process_data_config, data_tokens.load(folder), seed
    )
    documents = [document for block in made for document in _documents(block)]
    random.Random(seed).shuffle(documents)  # noqa: S311 - a draw, no secret
    kept: list[tuple[int, ...]] = []
    left = tokens
    for document in documents:
        if left <= 0:
            break
        kept.append(tuple(document[:left]))
        left -= len(kept[-1])
    found = Calibration(tuple(kept))
    if found.tokens < MINIMUM:
        raise ConfigError(
            f"{config.name} has {found.tokens} tokens; a calibration needs {MINIMUM} at the very least",
            fix=f"Name data of {ENOUGH} tokens and more.",
        )
    return found


def _documents(block: Any) -> list[list[int]]:
    parts, start = [], 0
    for length in block.lengths:
        parts.append(block.ids[start : start + length])
        start += length
    return parts


def check(params: DataParams, instead: str = "KQuant") -> Sequence[Problem]:
    """Whether there is data at all; ``instead`` is the pass that needs none."""
    if params.data_config is None:
        return [
            Problem(
                "there is nothing to calibrate on: no data_config, and no fine-tuning before",
                where="data_config",
                fix=f"Name a data config, or use {instead}, which needs no data.",
            )
        ]
    return []


def count(params: DataParams, data: Mapping[str, Preview]) -> int:
    """Tokens that will be used, by the previews of a plan.

    Raises:
        ConfigError: too few for any calibration.
    """
    found = data.get(params.data_config or "")
    if found is None or not found.tokens:
        return params.calibration_tokens
    if found.tokens < MINIMUM:
        raise ConfigError(
            problems=[
                Problem(
                    f"{found.name} has {found.tokens} tokens; a calibration needs at least {MINIMUM}",
                    where="data_config",
                    fix=f"Name data of {ENOUGH} tokens and more, or use KQuant.",
                )
            ]
        )
    return min(found.tokens, params.calibration_tokens)
