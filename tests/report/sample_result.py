"""A RunResult made by hand, as a run of the shipped example would give."""

from __future__ import annotations

import math

from olive.engine.result import Finding, GateResult, RunResult, StepResult
from olive.evaluation.score import Score
from olive.models.artifact import Kind


def scores(accuracy: float, perplexity: float, speed: float) -> tuple[Score, ...]:
    return (
        Score(metric="tone", name="exact_match", value=accuracy, count=240, spread=0.031, priority=1),
        Score(
            metric="perplexity",
            name="perplexity",
            value=perplexity,
            higher_is_better=False,
            count=240,
            priority=2,
        ),
        Score(metric="speed", name="tokens_per_second", value=speed, unit="tokens/s", count=5),
        Score(
            metric="speed",
            name="time_to_first_token",
            value=900 / speed,
            unit="ms",
            higher_is_better=False,
            count=5,
        ),
    )


def loss(count: int = 24) -> list[dict[str, float]]:
    points = []
    for index in range(1, count + 1):
        point = {
            "step": index * 10.0,
            "loss": 0.35 + 3.1 * math.exp(-index / 5) + 0.06 * math.sin(index * 2.1),
        }
        if index % 6 == 0:
            point["eval_loss"] = 0.42 + 3.0 * math.exp(-index / 5)
        points.append(point)
    return points


def result(**changes: object) -> RunResult:
    base = RunResult(
        document={
            "input_model": {"type": "HfModel", "model_path": "model-cache/microsoft/phi-3-mini"},
            "passes": {
                "lora": {"type": "LoRA", "r": 64, "alpha": 64, "target_modules": ["o_proj", "qkv_proj"]},
                "merge_adapter_weights": {"type": "MergeAdapterWeights"},
                "builder": {"type": "ModelBuilder", "precision": "int4"},
            },
            "output_dir": "olive-output",
        },
        input_size=537_900_000,
        input_scores=scores(0.004, 41.3, 22.0),
        steps=(
            StepResult(
                name="lora",
                type="LoRA",
                key="a1" * 32,
                cached=False,
                seconds=431.2,
                peak_memory=2_430_000_000,
                kind=Kind.ADAPTER,
                digest="b" * 64,
                size=14_700_000,
                scores=scores(0.933, 8.12, 19.5),
                series={"loss": loss()},
                facts={
                    "dtype": "float32",
                    "trainable_parameters": 3_686_400,
                    "tokens": 51_200,
                    "blocks": 212,
                },
            ),
            StepResult(
                name="merge_adapter_weights",
                type="MergeAdapterWeights",
                key="c2" * 32,
                cached=True,
                seconds=4.3,
                peak_memory=1_100_000_000,
                kind=Kind.HF,
                digest="d" * 64,
                size=537_900_000,
                gates=(
                    GateResult(
                        gate="merge", passed=True, figures={"kl": 2.1e-8, "changed": 60}, limits={"kl": 1e-6}
                    ),
                ),
            ),
            StepResult(
                name="builder",
                type="ModelBuilder",
                key="e3" * 32,
                cached=False,
                seconds=31.7,
                peak_memory=1_900_000_000,
                kind=Kind.GENAI,
                digest="f" * 64,
                size=121_300_000,
                scores=scores(0.929, 8.31, 61.8),
                gates=(
                    GateResult(
                        gate="parity",
                        passed=True,
                        figures={"kl": 0.0123, "top1": 0.972},
                        limits={"kl": 0.5, "top1": 0.7},
                    ),
                    GateResult(
                        gate="bundle",
                        passed=True,
                        figures={"load_seconds": 0.61},
                        text="I miss the house where I grew up → sadness",
                    ),
                ),
                facts={"precision": "int4", "execution_provider": "CPUExecutionProvider"},
            ),
        ),
        output_dir="olive-output",
        machine={
            "system": "Linux 6.1",
            "cpu": "Intel(R) Xeon(R) Processor @ 2.70GHz",
            "cores": 2,
            "memory": 16_700_000_000,
            "execution_providers": ["CPUExecutionProvider"],
            "python": "3.11.9",
            "gpus": [],
        },
        versions={"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "onnxruntime": "1.32.0"},
        started="2026-05-04T09:12:44+00:00",
        seconds=512.4,
        cpu_seconds=981.0,
        peak_memory=2_430_000_000,
        findings=(
            Finding(
                severity="note",
                message="`lora_r` is now `r`",
                where="olive-config.json:21: $.passes.lora.config.lora_r",
            ),
            Finding(
                severity="warning",
                message="eval_steps is 187, but training stops at step 10: evaluation would never happen",
                where="olive-config.json:30: $.passes.lora.config.training_args.eval_steps",
                fix="Set eval_steps to at most 10, or raise max_steps.",
            ),
        ),
        prompt_template="### Text: {phrase}\n### The tone is:\n",
        sample={
            "prompt": "### Text: I miss the house where I grew up\n### The tone is:\n",
            "completion": "sadness",
        },
    )
    return base.model_copy(update=changes)
