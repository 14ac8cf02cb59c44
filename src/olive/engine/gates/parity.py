"""The parity gate: the exported model says what its source says, on the execution provider it will run on."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from olive.config.gates import ParityGate
from olive.engine.gates import quantised
from olive.engine.gates.compare import Comparison, References, compare, probes, torch_logits
from olive.engine.result import GateResult
from olive.errors import PassFailed
from olive.models.artifact import Artifact, Kind
from olive.passes.base import PassContext

if TYPE_CHECKING:
    import numpy as np
    import torch

# precision -> (KL in nat a token, share of positions with the same most likely token). They catch what is
# broken: a sound round-to-nearest int4 of a small model is at 0.1 to 0.5 and 0.7 to 0.9.
_LIMITS = {
    "fp32": (1e-3, 0.98),
    "fp16": (2e-2, 0.95),
    "bf16": (1e-1, 0.85),
    "int8": (3e-1, 0.75),
    "int4": (2.0, 0.25),
    "int2": (6.0, 0.05),
}
_WHERE = "ModelBuilder"
_FLAT, _SHARP = 0.995, 0.97
_ANSWER, _STUCK = 16, 12
_NEXT = {
    "int4": "Use is_symmetric false, block_size 16 or algo_config k_quant_mixed, or precision int8.",
    "int8": "Use precision fp32, or fp16 where the execution provider runs it.",
}
_EXPORT = "Compare onnxruntime and onnxruntime-genai with the tested set: olive doctor."


def check(
    before: Artifact,
    after: Path,
    settings: ParityGate,
    ctx: PassContext,
    prompts: list[list[int]],
    known: References | None = None,
) -> GateResult:
    """Compare the logits of ``before`` and of ``after`` in ONNX Runtime at every position.

    ``before`` runs in PyTorch in float32; a bundle runs in ONNX Runtime too.

    Args:
        before: Hugging Face model, or a bundle that a pass on graphs changed.
        after: folder with genai_config.json; or of a Hugging Face model whose weights became integers.
        settings: thresholds; those left out depend on the precision and catch what is broken.
        ctx: context of the export: target and precision.
        prompts: token ids.
        known: may hold the source's logits from the gate before.

    Raises:
        PassFailed: NaN, flat logits, a distance above its limit, or an answer that is stuck on one token.
    """
    precision = str(ctx.attributes.get("precision", "fp32"))
    max_kl, min_top1 = _LIMITS.get(precision, _LIMITS["int4"])
    limits = {
        "kl": settings.max_kl or max_kl,
        "top1": min_top1 if settings.min_top1 is None else settings.min_top1,
    }
    if not (after / "genai_config.json").is_file() and (after / "config.json").is_file():
        return quantised.check(before, after, limits, settings, ctx, prompts, known)
    config = _read_config(after)
    chosen = probes(prompts, int(config["vocab_size"]), settings.prompts)
    provider = ctx.target.execution_provider
    expected = (known.take(before.path, chosen) if known else None) or _logits_of_source(
        before, chosen, provider
    )
    _check_source(expected, int(config["vocab_size"]), precision)
    runtime = _Runtime(after, config, provider)
    found = compare(expected, map(runtime.logits, chosen))
    answer = runtime.answer(chosen[0], _ANSWER)
    _judge(found, limits, precision)
    stuck = _longest_run(answer) >= _STUCK
    if stuck and _longest_run(_answer_of_source(before, chosen[0], provider)) < _STUCK:
        _fail(f"the exported model repeats token {answer[-1]} and its source does not", precision)
    figures = found.figures | {"longest_repeat": float(_longest_run(answer))}
    text = f"{precision}: KL {found.kl:.3g} nat a token, top token agrees at {found.top1:.0%} of positions"
    return GateResult(gate="parity", passed=True, figures=figures, limits=limits, text=text)


def _check_source(expected: list[torch.Tensor], vocabulary: int, precision: str) -> None:
    if not all(bool(logits.isfinite().all()) for logits in expected):
        raise PassFailed(
            "parity gate: the source model itself gives NaN or infinity",
            where=_WHERE,
            fix="Look at the passes before this one; of a fine-tuning, lower the learning rate.",
        )
    if expected[0].shape[-1] != vocabulary:
        _fail(
            f"the exported model has a vocabulary of {vocabulary}, its source of {expected[0].shape[-1]}",
            precision,
        )


def _judge(found: Comparison, limits: dict[str, float], precision: str) -> None:
    if found.bad:
        _fail(f"NaN or infinity at {found.bad} of {found.positions} positions", precision)
    if found.flatness(1) > _FLAT and found.flatness(0) < _SHARP:
        _fail(
            f"flat logits: entropy {found.flatness(1):.1%} of a blind guess, source {found.flatness(0):.1%}",
            precision,
        )
    if not found.kl <= limits["kl"]:
        _fail(f"KL(source, exported) is {found.kl:.3g} nat a token, above {limits['kl']:.3g}", precision)
    if not found.top1 >= limits["top1"]:
        _fail(f"the top token agrees at {found.top1:.1%} of positions, below {limits['top1']:.1%}", precision)


def _fail(message: str, precision: str) -> NoReturn:
    raise PassFailed(
        f"parity gate: {message} (precision {precision})",
        where=_WHERE,
        fix=_NEXT.get(precision, _EXPORT),
    )


def _does_not(what: str, error: Exception) -> PassFailed:
    return PassFailed(
        f"parity gate: the exported model does not {what}: {type(error).__name__}: {error}",
        where=_WHERE,
        fix=_EXPORT,
    )


def _longest_run(tokens: list[int]) -> int:
    """Length of the longest run of one token."""
    best = length = 0
    for number, token in enumerate(tokens):
        length = length + 1 if number and token == tokens[number - 1] else 1
        best = max(best, length)
    return best


def _logits_of_source(model: Artifact, prompts: list[list[int]], provider: str) -> list[torch.Tensor]:
    """One model after the other, so that both are never in memory together."""
    from olive.models.hf import load_model

    if model.kind is Kind.GENAI:
        return list(map(_Runtime(model.path, _read_config(model.path), provider).logits, prompts))
    expected = torch_logits(load_model(model.path, dtype="float32"), prompts)
    gc.collect()
    return expected


def _answer_of_source(source: Artifact, ids: list[int], provider: str) -> list[int]:
    import torch

    from olive.models.hf import load_model

    if source.kind is Kind.GENAI:
        return _Runtime(source.path, _read_config(source.path), provider).answer(ids, _ANSWER)
    model, made = load_model(source.path, dtype="float32"), list(ids)
    stop = _ids(model.generation_config.eos_token_id)
    with torch.inference_mode():
        state = model(input_ids=torch.tensor([ids]), use_cache=True)
        while len(made) < len(ids) + _ANSWER:
            made.append(int(state.logits[0, -1].argmax()))
            if made[-1] in stop:
                break
            state = model(
                input_ids=torch.tensor([made[-1:]]), past_key_values=state.past_key_values, use_cache=True
            )
    return made[len(ids) :]


def _ids(value: int | list[int] | None) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}


def _read_config(folder: Path) -> dict[str, Any]:
    """``model`` of genai_config.json, with all that this gate reads of it."""
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        _ = config["vocab_size"], decoder["filename"], decoder["head_size"], decoder["outputs"]["logits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _does_not("have a readable genai_config.json", error) from error
    return dict(config)


class _Runtime:
    """The exported decoder in ONNX Runtime; ``config`` is what ``_read_config`` gives."""

    def __init__(self, folder: Path, config: dict[str, Any], provider: str) -> None:
        import onnxruntime

        decoder = config["decoder"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        path = str(folder / decoder["filename"])
        fallback = [] if provider == "CPUExecutionProvider" else ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=[provider, *fallback])
        except Exception as error:
            raise _does_not("load", error) from error
        if self.session.get_providers()[0] != provider:
            raise PassFailed(
                f"parity gate: asked for {provider}, the session runs on {self.session.get_providers()[0]}",
                where=_WHERE,
                fix=f"Install an onnxruntime that brings {provider}, or change the target.",
            )
        self.stop = _ids(config.get("eos_token_id"))
        self._head_size = int(decoder["head_size"])
        self._outputs = [output.name for output in self.session.get_outputs()]
        self._logits = self._outputs.index(decoder["outputs"]["logits"])
        self._past = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past")}
        self._names = {i.name for i in self.session.get_inputs()}

    def logits(self, ids: list[int]) -> torch.Tensor:
        """(positions, vocabulary) float32."""
        import torch

        return torch.from_numpy(self._run(ids, 0, self._empty())[self._logits][0].astype("float32"))

    def answer(self, ids: list[int], length: int) -> list[int]:
        """Greedy continuation through the key-value cache, at most ``length`` tokens."""
        made: list[int] = []
        past, feed = self._empty(), ids
        while len(made) < length:
            values = self._run(feed, len(ids) + len(made) - len(feed), past)
            made.append(int(values[self._logits][0, -1].argmax()))
            if made[-1] in self.stop:
                break
            present = dict(zip(self._outputs, values, strict=True))
            past = {name: present[name.replace("past_key_values", "present")] for name in self._past}
            feed = made[-1:]
        return made

    def _run(self, ids: list[int], seen: int, past: dict[str, np.ndarray]) -> list[np.ndarray]:
        import numpy as np

        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, seen + len(ids)), dtype=np.int64),
            "position_ids": np.arange(seen, seen + len(ids), dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in self._names} | past
        try:
            values: list[np.ndarray] = self.session.run(self._outputs, feeds)
        except Exception as error:
            raise _does_not("run", error) from error
        return values

    def _empty(self) -> dict[str, np.ndarray]:
        import numpy as np

        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        empty = {}
        for name, value in self._past.items():
            if value.type not in kinds:
                raise PassFailed(
                    f"parity gate: {name} is of type {value.type}, which cannot be fed from here",
                    where=_WHERE,
                    fix="Use precision fp16, or switch the gate off: gates.parity.enabled false.",
                )
            heads = value.shape[1]
            empty[name] = np.zeros((1, heads, 0, self._head_size), dtype=kinds[value.type])
        return empty
