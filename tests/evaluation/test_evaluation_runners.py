from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from olive.config.workflow import Accelerator
from olive.errors import ConfigError, EnvironmentFault, PassFailed
from olive.evaluation.runners.base import Document, by_length
from olive.evaluation.runners.genai import GenaiRunner
from olive.evaluation.runners.pytorch import PytorchRunner
from olive.hardware.probe import probe
from olive.models.artifact import Artifact
from olive.models.genai import GenaiModel

PAD, EOS, NEW = 2, 3, 10


@pytest.fixture(scope="module")
def reference(hf_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["pytorch", "genai"])
def runner(request: pytest.FixtureRequest) -> Any:
    if request.param == "pytorch":
        return PytorchRunner(request.getfixturevalue("hf_model"), probe(), Accelerator())
    return GenaiRunner(request.getfixturevalue("genai_model"), Accelerator())


def _prompts(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(10, 384) for _ in range(length)] for length in (5, 9, 12, 12, 7, 31, 1)]
    # What chat prompts hold and a padding-by-value runtime forgets: pad and end tokens inside the prompt.
    prompts[0][2] = prompts[1][-1] = PAD
    prompts[2][4] = prompts[3][-1] = EOS
    return prompts


def _alone(model: Any, prompt: list[int], new: int = NEW, stops: tuple[int, ...] = (EOS,)) -> list[int]:
    ids = torch.tensor([prompt])
    found: list[int] = []
    with torch.inference_mode():
        for _ in range(new):
            token = int(model(ids).logits[0, -1].argmax())
            if token in stops:
                break
            found.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return found


def test_a_batch_gives_what_each_prompt_gives_alone(runner: Any, reference: Any) -> None:
    prompts = _prompts()
    expected = [_alone(reference, prompt) for prompt in prompts]
    assert runner.generate(prompts, NEW, frozenset()) == expected
    assert [runner.generate([prompt], NEW, frozenset())[0] for prompt in prompts] == expected


def test_generation_ends_at_stop_tokens(runner: Any, reference: Any) -> None:
    prompts = _prompts(1)
    stops = {_alone(reference, prompt)[3] for prompt in prompts[:4] if len(_alone(reference, prompt)) > 3}
    expected = [_alone(reference, prompt, stops=(EOS, *stops)) for prompt in prompts]
    assert runner.generate(prompts, NEW, frozenset(stops)) == expected
    assert min(map(len, expected)) < NEW


def test_losses_are_those_of_the_whole_sequence_in_float64(runner: Any, reference: Any) -> None:
    draw = random.Random(2)
    documents = []
    for length in (2, 30, 30, 400, 30):
        ids = tuple(draw.randrange(384) for _ in range(length))
        labels = tuple(-100 if index % 3 == 0 else token for index, token in enumerate(ids))
        documents.append(Document(ids, labels))
    exact = reference.double()
    for document, loss in zip(documents, runner.losses(documents, lambda done: None), strict=True):
        with torch.inference_mode():
            logits = exact(torch.tensor([document.ids])).logits[0]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(document.targets()), ignore_index=-100, reduction="sum"
        )
        # float32 against float64 through two layers: 1e-4 relative.
        assert loss == pytest.approx(float(expected), rel=1e-4)
    reference.float()


def test_timed_runs_end_at_no_token(runner: Any) -> None:
    for prompt in _prompts()[:3]:
        times = runner.time_tokens(prompt, 40)
        assert len(times) == 40
        assert all(second > 0 for second in times)


def test_windows_of_logits_do_not_change_losses(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    documents = [
        Document(ids, ids) for ids in (tuple(draw.randrange(384) for _ in range(n)) for n in (50, 49, 7))
    ]
    whole = runner.losses(documents, lambda done: None)
    monkeypatch.setattr(f"{type(runner).__module__}.WINDOW", 24)
    assert runner.losses(documents, lambda done: None) == pytest.approx(whole, rel=1e-5)


def test_genai_refuses_what_it_cannot_do(genai_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="genai_config"):
        GenaiModel(tmp_path)
    model = GenaiModel(genai_folder)
    with pytest.raises(ConfigError, match="prompt 2 is empty"):
        model.generate_batch([[5], []], 4)
    with pytest.raises(ConfigError, match="beyond the model's context of 512"):
        model.generate_batch([[5] * 510], 4)
    with pytest.raises(EnvironmentFault, match="CUDA"):
        GenaiModel(genai_folder, "CUDAExecutionProvider").generate_batch([[5]], 4)


def test_perplexity_asks_for_its_provider(genai_model: Artifact) -> None:
    accelerator = Accelerator(device="gpu", execution_providers=("CUDAExecutionProvider",))
    with pytest.raises(EnvironmentFault, match="CUDAExecutionProvider"):
        GenaiRunner(genai_model, accelerator).losses([Document((5, 6), (5, 6))], lambda done: None)


def test_batches_are_of_similar_length() -> None:
    lengths = [3, 9, 9, 1, 5, 9, 4]
    batches = list(by_length(lengths, rows=3, tokens=20))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches == [[1, 2], [5, 4], [6, 0, 3]]
    assert list(by_length(lengths, rows=3, tokens=100, equal=True)) == [[1, 2, 5], [4], [6], [0], [3]]
    assert list(by_length([50], rows=3, tokens=20)) == [[0]]
