"""A model in ONNX Runtime GenAI form, loaded: batched greedy generation that equals one-at-a-time.

Two properties of onnxruntime-genai (0.11 to 0.18) decide how a batch is padded:

- Its attention (GroupQueryAttention) takes the length of a row from the count of ones in its mask and expects
  them at the front: padding goes right. Left padding changes the answers.
- A token equal to ``pad_token_id`` is masked wherever it stands, also inside a prompt and also in a batch of
  one. Where the padding token is the end token, a chat prompt loses its turn ends. So the model is loaded
  with a padding id that no prompt of the call contains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from olive.errors import ConfigError, EnvironmentFault, PassFailed

_PROVIDERS = {
    "CUDAExecutionProvider": "cuda",
    "DmlExecutionProvider": "dml",
    "QNNExecutionProvider": "QNN",
    "OpenVINOExecutionProvider": "OpenVINO",
    "WebGpuExecutionProvider": "WebGPU",
    "NvTensorRTRTXExecutionProvider": "NvTensorRtRtx",
}


class GenaiModel:
    """A folder with ``genai_config.json``, loaded on first use.

    Args:
        folder: the model.
        execution_provider: where it runs.

    Raises:
        PassFailed: the folder has no readable ``genai_config.json``.
    """

    def __init__(self, folder: Path, execution_provider: str = "CPUExecutionProvider") -> None:
        self.folder = folder
        self.execution_provider = execution_provider
        config = _read(folder / "genai_config.json")
        self.config: dict[str, Any] = config["model"]
        eos = self.config.get("eos_token_id", ())
        self.eos_ids = frozenset(eos if isinstance(eos, list) else (eos,))
        self.context_length = int(self.config.get("context_length", 0))
        self.vocab_size = int(self.config["vocab_size"])
        self._model: Any = None
        self._pad_id = -1

    def generate_batch(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Iterable[int] = (),
    ) -> list[list[int]]:
        """Continue every prompt greedily, in one batch.

        Args:
            prompt_ids: token ids, one list a prompt, of any lengths.
            max_new_tokens: longest continuation.
            stop_ids: tokens that end a continuation, besides the model's own end tokens.

        Returns:
            The new tokens of each prompt, without the token that ended it.

        Raises:
            ConfigError: a prompt is empty, or prompt and answer are longer than the model's context.
        """
        stops = self.eos_ids | frozenset(stop_ids)
        answers: list[list[int]] = [[] for _ in prompt_ids]
        live = set(range(len(answers)))

        def keep(tokens: Sequence[int]) -> bool:
            for row in tuple(live):
                if tokens[row] in stops:
                    live.discard(row)
                else:
                    answers[row].append(int(tokens[row]))
            return bool(live)

        if prompt_ids and max_new_tokens > 0:
            self._steps(prompt_ids, max_new_tokens, 0, keep)
        return answers

    def time_tokens(self, prompt: Sequence[int], new_tokens: int) -> list[float]:
        """Seconds each of ``new_tokens`` took; the first one includes the prompt. No token ends the run."""
        times: list[float] = []
        last = perf_counter()

        def clock(_: Sequence[int]) -> bool:
            nonlocal last
            now = perf_counter()
            times.append(now - last)
            last = now
            return True

        self._load(self._free_id([prompt]))
        last = perf_counter()
        self._steps([prompt], new_tokens, new_tokens, clock)
        return times

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        min_new_tokens: int,
        keep: Callable[[Sequence[int]], bool],
    ) -> None:
        import numpy as np
        import onnxruntime_genai as og

        width = max(map(len, prompts))
        self._check_lengths(prompts, max_new_tokens)
        pad = self._free_id(prompts)
        self._load(pad)
        ids = np.full((len(prompts), width), pad, dtype=np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        params = og.GeneratorParams(self._model)
        params.set_search_options(
            batch_size=len(prompts),
            max_length=width + max_new_tokens,
            min_length=width + min_new_tokens if min_new_tokens else 0,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(ids)
        for _ in range(max_new_tokens):
            if generator.is_done():
                break
            generator.generate_next_token()
            if not keep(generator.get_next_tokens()):
                break

    def _check_lengths(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ConfigError(
                    f"prompt {row + 1} is empty", fix="Put text before the template's last field."
                )
            if self.context_length and len(prompt) + new_tokens > self.context_length:
                raise ConfigError(
                    f"prompt {row + 1} has {len(prompt)} tokens; with {new_tokens} new ones that is beyond "
                    f"the model's context of {self.context_length}",
                    fix="Shorten the text or lower max_new_tokens.",
                )

    def _free_id(self, prompts: Sequence[Sequence[int]]) -> int:
        used = {token for prompt in prompts for token in prompt} | self.eos_ids
        if self._pad_id >= 0 and self._pad_id not in used:
            return self._pad_id
        return next(token for token in range(self.vocab_size - 1, -1, -1) if token not in used)

    def _load(self, pad: int) -> None:
        if self._model is not None and pad == self._pad_id:
            return
        import onnxruntime_genai as og

        self._model = None
        config = og.Config(str(self.folder))
        config.overlay(json.dumps({"model": {"pad_token_id": pad}}))
        config.clear_providers()
        if self.execution_provider != "CPUExecutionProvider":
            config.append_provider(_provider(self.execution_provider))
        try:
            self._model = og.Model(config)
        except RuntimeError as error:
            raise PassFailed(
                f"{self.folder.name} does not load in onnxruntime-genai {og.__version__}: {error}",
                fix="Check `olive doctor`; export again with ModelBuilder.",
            ) from error
        self._pad_id = pad


def _provider(name: str) -> str:
    import onnxruntime_genai as og

    if name not in _PROVIDERS:
        raise EnvironmentFault(
            f"onnxruntime-genai has no {name}", fix=f"It has: CPUExecutionProvider, {', '.join(_PROVIDERS)}."
        )
    # Asked here because genai itself may fall back to the CPU without a word.
    if name == "CUDAExecutionProvider" and not og.is_cuda_available():
        raise EnvironmentFault(
            "CUDAExecutionProvider was asked for, and this onnxruntime-genai was built without CUDA",
            fix="Install onnxruntime-genai-cuda, or use CPUExecutionProvider.",
        )
    return _PROVIDERS[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model"]["vocab_size"]
    except FileNotFoundError:
        raise PassFailed(f"{path.parent} has no {path.name}", fix="Export it with ModelBuilder.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise PassFailed(f"{path} is damaged: {error!r}", fix="Export it again with ModelBuilder.") from error
    return dict(config)
