"""Run one pass on a model folder, as tests of several passes do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext
from olive.passes.registry import resolve
from training_kit import context, data, rows


def run(name: str, source: Path, folder: Path, **params: Any) -> PassContext:
    """Run the pass ``name`` with 96 rows of training data; a folder used before is gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    technique = resolve(name)
    wanted = technique.Params.model_validate(params)
    ctx = context(folder, data(rows(folder, 96)))
    technique().run(Artifact(kind=Kind.HF, path=source, digest="0" * 64), wanted, ctx)
    technique().ensure(ctx.out)
    return ctx
