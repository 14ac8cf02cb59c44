"""Ranges of activations: the graph runs on calibration data, its values reduced as it goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olive.errors import PassFailed
from olive.passes.onnx.histograms import Histogram

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from olive.passes.base import Progress
    from olive.passes.onnx.feeds import Feeds

Method = Literal["MinMax", "Entropy", "Percentile"]
Range = tuple[float, float]
_FLOATS = (1, 10)  # float32, float16


@dataclass(frozen=True, slots=True)
class How:
    """How ranges are found.

    Attributes:
        method: ``MinMax``: all that was seen; ``Percentile``, ``Entropy``: rare large magnitudes are cut off.
        percentile: of magnitudes that stay.
        moving: weight of a new row in a running average of minimum and maximum; None: extremes of all.
        symmetric: whether minimum and maximum have the same magnitude.
        providers: execution providers to run on.
    """

    method: Method
    percentile: float = 99.999
    moving: float | None = None
    symmetric: bool = False
    providers: tuple[str, ...] = ("CPUExecutionProvider",)


def tensors(
    model: ModelProto, kinds: Iterable[str], nodes: Iterable[str], without: Iterable[str]
) -> list[str]:
    """Values in floating point that some nodes read or write, weights aside, in the order of the graph.

    Args:
        model: types of its values known.
        kinds: types of operators.
        nodes: names; empty: all.
        without: names.
    """
    kinds, chosen, left = set(kinds), set(nodes), set(without)
    typed = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    floats = {one.name for one in typed if one.type.tensor_type.elem_type in _FLOATS}
    floats -= {one.name for one in model.graph.initializer}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.op_type in kinds and node.name not in left and (not chosen or node.name in chosen):
            found |= dict.fromkeys(name for name in (*node.input, *node.output) if name in floats)
    return list(found)


def collect(path: Path, names: list[str], feeds: Feeds, how: How, progress: Progress) -> dict[str, Range]:
    """Ranges of values.

    Args:
        path: of the graph; a second one is written beside it.
        names: of the values; those that are always empty get no range.
        feeds: calibration data.
        how: method.
        progress: told each row.

    Raises:
        PassFailed: a value is NaN or infinite, or the graph does not run; names the value, node and row.
    """
    passes = 1 if how.method == "MinMax" else 2
    progress.start("calibrate", passes * len(feeds.rows))
    found = _extremes(path, names, feeds, how, progress)
    if how.method != "MinMax":
        found = _cut(path, found, feeds, how, progress)
    progress.finish()
    if how.symmetric:
        found = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in found.items()}
    return found


def _extremes(path: Path, names: list[str], feeds: Feeds, how: How, progress: Progress) -> dict[str, Range]:
    import numpy as np

    observer = _Observer(path, names, how, reduced=True)
    found: dict[str, Range] = {}
    for number, feed in enumerate(feeds):
        lows, highs, sums, outputs = observer.extremes(feed, number)
        # extremes may leave NaN out, sums never do
        sound = all(np.isfinite(one).all() for one in outputs if one.dtype.kind == "f")
        if not sound or not all(np.isfinite(one) for one in sums if one is not None):
            _check_sound(path, names, feed, number, how)
        for name, low, high in zip(names, lows, highs, strict=True):
            if low is None or high is None:
                continue
            old = found.get(name)
            if old is None:
                found[name] = low, high
            elif how.moving is None:
                found[name] = min(old[0], low), max(old[1], high)
            else:
                part = how.moving
                found[name] = old[0] + part * (low - old[0]), old[1] + part * (high - old[1])
        progress.update(min(number + 1, len(feeds.rows)))
    return found


def _cut(
    path: Path, ranges: dict[str, Range], feeds: Feeds, how: How, progress: Progress
) -> dict[str, Range]:
    """Ranges less what is rare: bins over the range that is known by now, so the order of rows is nothing."""
    observer = _Observer(path, list(ranges), how, reduced=False)
    counted = {name: Histogram(max(-low, high, 0.0)) for name, (low, high) in ranges.items()}
    for number, feed in enumerate(feeds):
        for name, value in observer.values(feed, number):
            counted[name].add(value)
        progress.update(len(feeds.rows) + min(number + 1, len(feeds.rows)))
    made = {}
    for name, (low, high) in ranges.items():
        one = counted[name]
        cut = one.entropy() if how.method == "Entropy" else one.percentile(how.percentile)
        made[name] = max(low, -cut), min(high, cut)
    return made


class _Observer:
    """The graph with values, or their extremes, among its outputs."""

    def __init__(self, path: Path, names: list[str], how: How, *, reduced: bool) -> None:
        import onnx
        import onnxruntime
        from onnx import helper

        self.names = names
        model = onnx.load(path, load_external_data=False)
        floats = [one.name for one in model.graph.output if one.type.tensor_type.elem_type in _FLOATS]
        self.outputs = floats if reduced else []
        wanted = list(names)
        if reduced:
            wanted = []
            for kind in ("Min", "Max", "Sum"):
                for place, name in enumerate(names):
                    made = f"olive_{kind}_{place}"
                    model.graph.node.append(
                        helper.make_node(f"Reduce{kind}", [name], [made], made, keepdims=1)
                    )
                    wanted.append(made)
        here = {one.name for one in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in here)
        self.wanted = wanted + self.outputs
        made_path = path.with_name("calibrated.onnx")
        made_path.write_bytes(model.SerializeToString())
        self.quiet = onnxruntime.RunOptions()
        self.quiet.log_severity_level = 4
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(
                str(made_path), options, providers=list(how.providers)
            )
        except Exception as error:  # onnxruntime has no common base of its errors
            raise PassFailed(
                f"the graph does not load for calibration: {error}", fix="Look at the model before this pass."
            ) from error

    def run(self, feed: dict[str, np.ndarray], number: int) -> list[np.ndarray]:
        """All that is wanted."""
        try:
            values: list[np.ndarray] = self.session.run(self.wanted, feed, self.quiet)
        except Exception as error:  # onnxruntime has no common base of its errors
            raise PassFailed(
                f"the graph does not run on feed {number + 1} of the calibration data: {error}",
                fix="Compare the data config with the graph's inputs.",
            ) from error
        return values

    def extremes(
        self, feed: dict[str, np.ndarray], number: int
    ) -> tuple[list[float | None], list[float | None], list[float | None], list[np.ndarray]]:
        """Minima, maxima, sums, None of what is empty, and the graph's own outputs."""
        values, count = self.run(feed, number), len(self.names)
        numbers = [float(one.reshape(-1)[0]) if one.size else None for one in values[: 3 * count]]
        return numbers[:count], numbers[count : 2 * count], numbers[2 * count :], values[3 * count :]

    def values(self, feed: dict[str, np.ndarray], number: int) -> Iterator[tuple[str, np.ndarray]]:
        """Name and value."""
        yield from zip(self.names, self.run(feed, number), strict=True)


def _check_sound(path: Path, names: list[str], feed: dict[str, np.ndarray], number: int, how: How) -> None:
    """Name the first value of the graph that is NaN or infinite, of those to be quantised and of its outputs.

    Raises:
        PassFailed: there is one. A sum of large values may be infinite where none of them is.
    """
    import numpy as np
    import onnx

    model = onnx.load(path, load_external_data=False)
    outputs = {one.name for one in model.graph.output if one.type.tensor_type.elem_type in _FLOATS}
    makers = {name: node for node in model.graph.node for name in node.output}
    looked = [name for name in makers if name in outputs or name in names]
    observer = _Observer(path, looked, how, reduced=False)
    for name, value in observer.values(feed, number):
        if not np.isfinite(value).all():
            node: Any = makers[name]
            what = "NaN" if np.isnan(value).any() else "infinity"
            raise PassFailed(
                f"feed {number + 1} of the calibration data makes {name} {what}, written by the "
                f"{node.op_type} {node.name!r}",
                fix="Look at the data and at the model; if it is meant, name the nodes that read and write "
                "it in nodes_to_exclude.",
            )
