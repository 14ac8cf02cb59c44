"""What a graph is run on to calibrate it: rows of tokens, or rows whose columns are the graph's inputs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import DataConfig
from olive.errors import ConfigError
from olive.passes.quantize import calibration
from olive.passes.quantize.calibration import MINIMUM

if TYPE_CHECKING:
    import numpy as np

    from olive.passes.base import PassContext
    from olive.passes.onnx.graphs import Graph

PIECE = 256  # tokens of a row that are run at once: all activations of these are in memory
FEW = 8  # rows that say little of what is usual
Feed = dict[str, "np.ndarray"]
_FIX = "Calibration feeds tensors; use OnnxDynamicQuantization, which needs no data."
_TOKENS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class FeedParams(PassParams):
    """Which rows."""

    data_config: str | None = Field(
        None,
        description="Data to calibrate on: text for a language model, else rows whose columns are the "
        "graph's inputs, as nested lists of numbers. Default: what the model was fine-tuned on.",
        json_schema_extra={"reference": "data_configs", "inherits": "train_data_config"},
    )
    calibration_tokens: int = Field(
        16_384,
        ge=MINIMUM,
        description="Of a language model: tokens to calibrate on; rows are drawn at random until there are "
        "as many.",
    )
    calibration_rows: int = Field(
        256, ge=1, description="Of any other graph: rows to calibrate on, drawn at random."
    )
    seed: int = Field(0, description="Of the draw.")


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a graph.

    Attributes:
        name: of it.
        dtype: numpy's.
        shape: sizes; None or a name where any will do.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]

    @property
    def text(self) -> str:
        """Dtype and shape, to be read."""
        return f"{self.dtype} [{', '.join('?' if one is None else str(one) for one in self.shape)}]"


@dataclass(frozen=True, slots=True)
class Feeds:
    """Feeds, as often as they are asked for.

    Attributes:
        inputs: of the graph.
        rows: token ids, or rows of the data config; each with its number in the data.
        tokens: whether rows are tokens.
        name: of the data config.
        cache: heads and head size of past keys, of a bundle that says so.
    """

    inputs: tuple[Input, ...]
    rows: Sequence[tuple[int, Any]]
    tokens: bool
    name: str
    cache: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Feed]:
        for number, row in self.rows:
            if self.tokens:
                yield from _token_feeds(self.inputs, row, self.cache)
            else:
                yield self._columns(number, row)

    def _columns(self, number: int, row: dict[str, Any]) -> Feed:
        sizes: dict[str, int] = {}
        return {one.name: _array(one, row[one.name], self._place(number, one), sizes) for one in self.inputs}

    def _place(self, number: int, one: Input) -> str:
        return f"{self.name}, row {number + 1}, column {one.name!r}"


def inputs_of(graph: Graph) -> tuple[Input, ...]:
    """Inputs that a feed must have.

    Raises:
        ConfigError: one is no tensor.
    """
    from onnx.helper import tensor_dtype_to_np_dtype

    made = []
    for one in graph.graph.input:
        if one.name in graph.weights:
            continue
        kind = one.type.tensor_type
        if not kind.elem_type:
            raise ConfigError(f"the input {one.name} of {graph.path.name} is no tensor", fix=_FIX)
        shape = tuple(
            int(size.dim_value) if size.HasField("dim_value") else (size.dim_param or None)
            for size in kind.shape.dim
        )
        made.append(Input(one.name, tensor_dtype_to_np_dtype(kind.elem_type), shape))
    return tuple(made)


def read(graph: Graph, folder: Path, params: FeedParams, ctx: PassContext) -> Feeds:
    """The feeds that the parameters of a pass ask for.

    Args:
        graph: to be fed.
        folder: of the model, with its tokenizer where it is a language model.
        params: name of the data config, and how much of it.
        ctx: has the data config.

    Raises:
        ConfigError: too little data, or data that does not fit the graph; names row and column.
    """
    from olive.data import rows as data_rows

    config = ctx.data.get(params.data_config or "")
    if config is None:
        raise ConfigError(
            f"there is no data config {params.data_config!r} to calibrate on",
            where="data_config",
            fix="Name one of data_configs, or use OnnxDynamicQuantization, which needs no data.",
        )
    inputs = inputs_of(graph)
    names = {one.name for one in inputs}
    first = data_rows.read(config, ctx.base_dir, 1)[0]
    if "input_ids" in names and "input_ids" not in first:
        return _tokens(inputs, folder, config, params, ctx)
    found = list(enumerate(data_rows.read(config, ctx.base_dir)))
    for number, row in found:
        missing = sorted(names - row.keys())
        if missing:
            raise ConfigError(
                f"{config.name}, row {number + 1} has no column {missing[0]!r}, which the graph takes as "
                f"{next(one.text for one in inputs if one.name == missing[0])}; it has {', '.join(row)}",
                where=f"data_configs.{config.name}",
                fix='Give each row one column an input, as nested lists: {"x": [[0.1, 0.2]]}.',
            )
    if len(found) > params.calibration_rows:
        draw = random.Random(params.seed)  # noqa: S311 - a draw, no secret
        found = sorted(draw.sample(found, params.calibration_rows), key=lambda one: one[0])
    if len(found) < FEW:
        ctx.progress.note(
            f"{config.name} has {len(found)} rows: too few to know the usual range of activations; give "
            f"{FEW} and more"
        )
    ctx.facts["calibration_rows"] = len(found)
    return Feeds(inputs, found, False, config.name)


def _tokens(
    inputs: tuple[Input, ...], folder: Path, config: DataConfig, params: FeedParams, ctx: PassContext
) -> Feeds:
    for one in inputs:
        known = one.name in _TOKENS or one.name.startswith("past")
        if not known or (one.name in _TOKENS and len(one.shape) != 2):
            raise ConfigError(
                f"no rows of text give the input {one.name} ({one.text}) of this language model",
                where=f"data_configs.{config.name}",
                fix="Give rows with a column for each input, input_ids among them.",
            )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{folder.name} has no tokenizer to make tokens of {config.name} with",
            where=f"data_configs.{config.name}",
            fix="Put the tokenizer's files beside the graph, or give rows with a column input_ids.",
        )
    found = calibration.read(config, folder, ctx.base_dir, params.calibration_tokens, params.seed)
    if found.tokens < calibration.ENOUGH:
        ctx.progress.note(
            f"{config.name} has {found.tokens:,} tokens to calibrate on; {calibration.ENOUGH:,} and more say "
            "what activations usually are"
        )
    ctx.facts |= {"calibration_rows": len(found.rows), "calibration_tokens": found.tokens}
    return Feeds(inputs, list(enumerate(found.rows)), True, config.name, _cache(folder))


def _cache(folder: Path) -> tuple[int, int] | None:
    """Heads and head size of the key-value cache, as a bundle says."""
    try:
        text = (folder / "genai_config.json").read_text(encoding="utf-8")
        decoder = json.loads(text)["model"]["decoder"]
        return int(decoder["num_key_value_heads"]), int(decoder["head_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _empty(shape: tuple[int | str | None, ...], cache: tuple[int, int] | None) -> list[int]:
    """Shape of a cache before the first token: one row, no positions."""
    heads, width = cache or (0, 0)
    known = {0: 1, 1: heads, 3: width} if len(shape) == 4 else {0: 1}
    return [size if isinstance(size, int) else known.get(place, 0) for place, size in enumerate(shape)]


def _token_feeds(
    inputs: tuple[Input, ...], row: Sequence[int], cache: tuple[int, int] | None
) -> Iterator[Feed]:
    """Pieces of a row; padded at the right where the graph has a fixed length."""
    import numpy as np

    fixed = next(one.shape[1] for one in inputs if one.name == "input_ids")
    width = fixed if isinstance(fixed, int) else PIECE
    for start in range(0, len(row), width):
        ids = list(row[start : start + width])
        real, length = len(ids), fixed if isinstance(fixed, int) else len(ids)
        whole: dict[str, Any] = {
            "input_ids": ids + [0] * (length - real),
            "attention_mask": [1] * real + [0] * (length - real),
            "position_ids": list(range(length)),
            "token_type_ids": [0] * length,
        }
        feed: Feed = {}
        for one in inputs:
            if one.name in whole:
                feed[one.name] = np.array([whole[one.name]], one.dtype)
            else:
                feed[one.name] = np.zeros(_empty(one.shape, cache), one.dtype)
        yield feed


def _array(one: Input, value: Any, place: str, sizes: dict[str, int]) -> np.ndarray:
    """A column as the graph takes it.

    Args:
        one: the input.
        value: numbers, or nested lists of them.
        place: of it in the data, for messages.
        sizes: of the named dimensions that other inputs of the row have set.

    Raises:
        ConfigError: it does not fit.
    """
    import numpy as np

    def fail(what: str) -> ConfigError:
        return ConfigError(
            f"{place}: {what}; the graph takes {one.text}",
            fix="Nested lists of numbers, as deep as the input has dimensions.",
        )

    try:
        given = np.asarray(value)
    except ValueError as error:
        raise fail("lists of different lengths") from error
    if given.dtype.kind not in "biuf":
        raise fail("not numbers")
    if given.dtype.kind == "f" and not np.isfinite(given).all():
        raise fail("NaN or infinity")
    with np.errstate(over="ignore", invalid="ignore"):
        made = given.astype(one.dtype)
    if one.dtype.kind in "iub" and not np.array_equal(made.astype(given.dtype), given):
        raise fail(f"numbers that {one.dtype} does not hold")
    if given.dtype.kind in "iuf" and one.dtype.kind == "f" and not np.isfinite(made).all():
        raise fail(f"numbers that {one.dtype} does not hold")
    if len(made.shape) != len(one.shape):
        raise fail(f"shape {list(made.shape)}")
    for size, wanted in zip(made.shape, one.shape, strict=True):
        expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
        if expected is not None and expected != size:
            raise fail(f"shape {list(made.shape)}, where {wanted} is {expected}")
    return made
