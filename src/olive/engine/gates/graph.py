"""The graph gate: a changed ONNX graph gives what the graph it was made of gives, on the same inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.config.gates import GraphGate
from olive.engine.gates.compare import References
from olive.engine.gates.made_up import inputs
from olive.engine.result import GateResult
from olive.errors import GateFailed, PassFailed
from olive.models.artifact import Artifact
from olive.passes.base import PassContext
from olive.passes.onnx.feeds import FeedParams, read
from olive.passes.onnx.graphs import Graph, graph_file, open_graph
from olive.passes.quantize.calibration import MINIMUM

if TYPE_CHECKING:
    import numpy as np

# Relative error of an output by precision; they catch what is broken.
_LIMITS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int16": 5e-2, "int8": 4e-1, "int4": 8e-1}
_FIX = (
    "Leave out the worst layers (nodes_to_exclude), or use a wider precision; gates.graph.max_error moves it."
)


def check(
    before: Artifact,
    after: Path,
    settings: GraphGate,
    ctx: PassContext,
    prompts: list[list[int]] | None = None,
    known: References | None = None,
) -> GateResult:
    """Run both graphs in ONNX Runtime on the target's provider, first one, then the other.

    The inputs are rows of the pass's data where it has any, else seeded random ones in the shapes that the
    graph declares.

    Raises:
        PassFailed: a graph does not load or run.
        GateFailed: NaN or infinity that was not there before, or an output beyond the limit.
    """
    provider = ctx.target.execution_provider
    precision = str(ctx.attributes.get("precision", "fp32"))
    limit = settings.max_error or _LIMITS.get(precision, _LIMITS["int4"])
    source = open_graph(before)
    feeds = _feeds(source, before.path, settings, ctx)
    expected = _run(source.path, feeds, provider, "the source model")
    found = _run(graph_file(after), feeds, provider, "the changed model")
    figures: dict[str, float] = {}
    worst, name = 0.0, ""
    for output in expected:
        if output not in found:
            raise PassFailed(
                f"graph gate: the changed model has no output {output!r}",
                fix="Pass developer: keep the outputs of the graph.",
            )
        error = _error(output, expected[output], found[output])
        figures[f"error {output}"] = error
        if error >= worst:
            worst, name = error, output
    figures |= {"error": worst, "inputs": float(len(feeds))}
    if not worst <= limit:
        raise GateFailed(
            f"graph gate: the output {name} moved by {worst:.3g} of its size, above {limit:.3g} "
            f"(precision {precision})",
            fix=_FIX,
            figures=figures,
            limits={"error": limit},
        )
    text = f"{precision}: {name} moved by {worst:.2g} of its size on {len(feeds)} inputs"
    return GateResult(gate="graph", passed=True, figures=figures, limits={"error": limit}, text=text)


class _Quiet:
    """Says nothing: the pass has said it of the same data."""

    def start(self, task: str, total: int | None = None) -> None: ...
    def update(self, done: int, **fields: float | str) -> None: ...
    def finish(self) -> None: ...
    def note(self, message: str) -> None: ...


def _feeds(source: Graph, folder: Path, settings: GraphGate, ctx: PassContext) -> list[dict[str, np.ndarray]]:
    """Rows of the pass's data where it has any: what it was calibrated on says what its inputs are like."""
    if not ctx.data:
        return [inputs(source, seed) for seed in range(settings.samples)]
    wanted = FeedParams(
        data_config=next(iter(ctx.data)), calibration_rows=settings.samples, calibration_tokens=MINIMUM
    )
    aside = replace(ctx, facts={}, progress=_Quiet())
    return list(islice(read(source, folder, wanted, aside), settings.samples))


def _run(
    path: Path, feeds: list[dict[str, np.ndarray]], provider: str, what: str
) -> dict[str, list[np.ndarray]]:
    """Output -> its value of each input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = [provider, *([] if provider == "CPUExecutionProvider" else ["CPUExecutionProvider"])]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        names = [output.name for output in session.get_outputs()]
        types = {one.name: one.type for one in session.get_inputs()}
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for feed in feeds:
            given = {name: _cast(value, types[name]) for name, value in feed.items() if name in types}
            for name, value in zip(names, session.run(names, given), strict=True):
                found[name].append(value)
    except Exception as error:
        raise PassFailed(
            f"graph gate: {what} does not load or run: {type(error).__name__}: {error}",
            fix="Compare onnxruntime with the tested set (olive doctor); if only made-up inputs fail, give "
            "the pass data, or switch the gate off: gates.graph.enabled false.",
        ) from error
    return found


def _cast(value: np.ndarray, kind: str) -> np.ndarray:
    """An input in the dtype that the graph takes; half precision may have changed it."""
    import numpy as np

    kinds: dict[str, Any] = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
    return value.astype(kinds[kind]) if value.dtype.kind == "f" and kind in kinds else value


def _error(name: str, expected: list[np.ndarray], found: list[np.ndarray]) -> float:
    """Root of the mean square of the difference, as a share of that of the expected values."""
    import numpy as np

    size = moved = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            raise PassFailed(
                f"graph gate: the output {name} has shape {other.shape}, and had {one.shape}",
                fix="Pass developer: keep the outputs of the graph.",
            )
        if one.dtype.kind not in "fiub" and one.dtype.name != "bfloat16":
            continue
        a, b = one.astype(np.float64), other.astype(np.float64)
        sound = np.isfinite(a)
        bad = int((sound & ~np.isfinite(b)).sum())
        if bad:
            raise GateFailed(
                f"graph gate: {bad} values of the output {name} are NaN or infinity, and were not",
                fix=_FIX,
                figures={"bad": float(bad)},
                limits={"bad": 0.0},
            )
        size += float(np.square(a[sound]).sum())
        moved += float(np.square((a - b)[sound]).sum())
    return float(np.sqrt(moved / size)) if size else float(moved > 0)
