"""The data of a fine-tuning pass as blocks: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from olive.config.workflow import DataConfig
from olive.data.blocks import Blocks
from olive.data.layout import Block
from olive.errors import ConfigError
from olive.models.artifact import Artifact
from olive.passes.base import PassContext

if TYPE_CHECKING:
    from olive.data.tokens import LightTokenizer
    from olive.passes.finetune.tuning import TuningParams


class TrainingData(NamedTuple):
    """Blocks to train on, blocks to evaluate on, and how their tokens read."""

    train: Sequence[Block]
    held_out: Sequence[Block]
    decode: Callable[[Sequence[int]], str]


def load(model: Artifact, params: TuningParams, ctx: PassContext, *, pairs: bool = False) -> TrainingData:
    """The blocks of ``params``' data; of ``pairs``, each block is one.

    Raises:
        ConfigError: a data config is not there, its rows do not fit, or nothing would be learnt.
    """
    from olive.data import split, tokens

    tokenizer = tokens.load(model.path if model.base is None else model.base.path)
    seed = split.split_seed(params.training_args)
    config = _data(ctx, params.train_data_config)
    other = _data(ctx, params.eval_data_config) if params.eval_data_config else None
    size = 0 if other else params.eval_dataset_size or 0
    made, held = _build(config, tokenizer, seed, ctx, pairs=pairs, eval_size=size)
    _tell(made, ctx)
    if other is not None:
        held, _ = _build(other, tokenizer, seed, ctx, pairs=pairs, evaluation=True)
    return TrainingData(made.blocks, held.blocks if held else [], tokenizer.decode)


def _build(
    config: DataConfig,
    tokenizer: LightTokenizer,
    seed: int,
    ctx: PassContext,
    *,
    pairs: bool,
    eval_size: float = 0,
    evaluation: bool = False,
) -> tuple[Blocks, Blocks | None]:
    """Blocks of a data config, and those of the rows split off; in memory, or on disk where it is large."""
    from olive.data import blocks, preference, rows, size, split, stream

    free = ctx.machine.memory_available // ctx.place.local_size
    if size.streams(config, ctx.base_dir, free, pairs=pairs):
        ctx.progress.start(f"tokens of {config.name}")
        made = stream.build(
            config,
            ctx.base_dir,
            tokenizer,
            ctx.journal.path / ("tokens-evaluation" if evaluation else "tokens"),
            seed=seed,
            eval_size=eval_size,
            evaluation=evaluation,
            told=lambda done, total: ctx.progress.update(done, rows=total),
        )
        ctx.progress.finish()
        ctx.facts["streamed"] = [*ctx.facts.get("streamed", []), config.name]
        return made
    pre, read = config.pre_process_data_config, rows.read(config, ctx.base_dir)
    build, build_held_out = blocks.build, blocks.build_held_out
    if pairs:
        build = build_held_out = preference.build
    elif evaluation:
        build = build_held_out
    places, others = split.split_places(read, eval_size, seed, pre)
    held = [read[index] for index in others]
    return (
        build([read[index] for index in places], pre, tokenizer, seed, places),
        build_held_out(held, pre, tokenizer, seed, others) if held else None,
    )


def _tell(made: Blocks, ctx: PassContext) -> None:
    for note in made.notes:
        ctx.progress.note(str(note))
    ctx.facts |= {"rows": made.rows, "block_tokens": made.tokens, "label_tokens": made.trained_tokens}
    if not made.trained_tokens:
        raise ConfigError(
            f"none of the {made.tokens} tokens in {len(made)} blocks has a label: nothing would be learnt",
            fix="check train_on and the template's last field, or raise max_seq_len",
        )


def _data(ctx: PassContext, name: str) -> DataConfig:
    if name not in ctx.data:
        raise ConfigError(
            f"there is no data config called {name!r}", fix=f"there are: {', '.join(ctx.data) or 'none'}"
        )
    return ctx.data[name]
