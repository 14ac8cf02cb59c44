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
    from olive.passes.finetune.tuning import TuningParams


class TrainingData(NamedTuple):
    """Blocks to train on, blocks to evaluate on, and how their tokens read."""

    train: Sequence[Block]
    held_out: Sequence[Block]
    decode: Callable[[Sequence[int]], str]


def load(model: Artifact, params: TuningParams, ctx: PassContext) -> TrainingData:
    """The blocks of ``params``' data.

    Raises:
        ConfigError: a data config is not there, its rows do not fit, or nothing would be learnt.
    """
    from olive.data import blocks, rows, split, tokens

    tokenizer = tokens.load(model.path if model.base is None else model.base.path)
    seed = split.split_seed(params.training_args)
    config = _data(ctx, params.train_data_config)
    pre = config.pre_process_data_config
    read = rows.read(config, ctx.base_dir)
    places, others = split.split_places(read, 0, seed)
    if params.eval_dataset_size and not params.eval_data_config:
        places, others = split.split_places(read, params.eval_dataset_size, seed, pre)
    made = blocks.build([read[index] for index in places], pre, tokenizer, seed, places)
    held: Blocks | None = None
    if params.eval_data_config:
        other = _data(ctx, params.eval_data_config)
        asked = rows.read(other, ctx.base_dir)
        held = blocks.build_held_out(asked, other.pre_process_data_config, tokenizer, seed)
    elif others:
        held = blocks.build_held_out([read[index] for index in others], pre, tokenizer, seed, others)
    _tell(made, ctx)
    return TrainingData(made.blocks, held.blocks if held else [], tokenizer.decode)


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
