"""QuaRot: the residual stream and the heads turned by Hadamard matrices, folded into the weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from pydantic import Field

from olive.config.base import Dtype, PassParams
from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.hf import describe, open_model
from olive.models.quantised import EMBEDDING, HEAD
from olive.models.stream import stored_code
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.quantize import residual
from olive.passes.quantize.targets import CHOICE, tied

if TYPE_CHECKING:
    from olive.models.stream import LazyTensors
    from olive.passes.quantize.residual import Stream
    from olive.passes.quantize.rotated import Rotations

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class RotateParams(PassParams):
    """Settings of the passes that rotate; names of Olive 0.13."""

    rotate_mode: Literal["hadamard", "random"] = Field(
        "hadamard",
        description="Hadamard matrices with random signs, or random orthogonal matrices. Where no Hadamard "
        "matrix of an order is known, a random orthogonal one.",
    )
    seed: int = Field(0, description="Of signs and random matrices.")
    dtype: Dtype = Field(
        "float32",
        description="Dtype to store. A rotated weight is a sum, which no 16-bit dtype holds as well as the "
        "original: only float32 leaves all predictions as they were.",
    )


P = TypeVar("P", bound=RotateParams)


class Rotating(Pass[P]):
    """Base of the passes that rotate a model and leave its function as it is; they override ``rotations``."""

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.HF,)
    produces: ClassVar[Kind] = Kind.HF
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors", "transformers", "accelerate")
    gates = ("equivalence",)

    def check(
        self, model: ModelInfo, params: P, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Whether all that reads and writes the residual stream is known; what a shared embedding costs."""
        yield from residual.check(model)
        if tied(model):
            yield Problem(
                "embedding and head are one matrix and are turned differently: they become two "
                f"({self._head_bytes(model, params) / 1e6:,.0f} MB more)",
                severity=Severity.NOTE,
            )

    def estimate(self, model: ModelInfo, params: P, machine: Machine, data: Mapping[str, Preview]) -> Cost:
        """A tensor and its copies; the gate runs the whole model in float32."""
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        disk = model.parameters * _BYTES[params.dtype] + self._head_bytes(model, params)
        return Cost(
            memory=(700 << 20) + 4 * model.parameters + 12 * largest,
            disk=disk,
            seconds=2.0 + model.parameters * 4e-8,
        )

    def leaves(self, model: ModelInfo, params: P) -> ModelInfo:
        """Embedding and head apart, stored in the pass's dtype."""
        tensors = dict(model.tensors)
        if tied(model):
            tensors[f"{HEAD}.weight"] = tensors[f"{EMBEDDING}.weight"]
        stored = {name: (stored_code(code, params.dtype), shape) for name, (code, shape) in tensors.items()}
        config = residual.untied_config(model.config, params.dtype)
        return model.model_copy(update={"tensors": stored, "config": config})

    def _head_bytes(self, model: ModelInfo, params: P) -> int:
        """Bytes of a head that is the embedding now and becomes a matrix of its own."""
        shape = model.tensors.get(f"{EMBEDDING}.weight", ("", (0,)))[1]
        return prod(shape) * _BYTES[params.dtype] if tied(model) else 0

    def run(self, model: Artifact, params: P, ctx: PassContext) -> None:
        """Write the rotated model into ``ctx.out``.

        Raises:
            PassFailed: a weight is NaN or infinite.
        """
        import torch

        from olive.passes.quantize.rotated import write_folder

        began = time.perf_counter()
        if ctx.accelerator.device == "cpu":
            torch.set_num_threads(max(1, ctx.machine.cores))
        stream = residual.stream_of(describe(model.path))
        with open_model(model.path)[0] as tensors:
            by = self.rotations(model, tensors, stream, params, ctx)
            for note in by.notes:
                ctx.progress.note(note)
            ctx.progress.start("rotate", len(stream.folds))
            size = write_folder(model.path, tensors, stream, by, params.dtype, ctx.out, ctx.progress.update)
            ctx.progress.finish()
        if (model.path / CHOICE).is_file():  # bits by layer, for the quantiser after this
            (ctx.out / CHOICE).write_bytes((model.path / CHOICE).read_bytes())
        ctx.attributes["dtype"] = params.dtype
        ctx.facts |= {
            "method": type(self).__name__,
            "rotations": {"R1": stream.hidden, "R2": stream.head, "layers": stream.layers},
            "untied": stream.tied,
            "notes": list(by.notes),
            "bytes": size,
            "dtype": params.dtype,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def rotations(
        self, model: Artifact, tensors: LazyTensors, stream: Stream, params: P, ctx: PassContext
    ) -> Rotations:
        """R1 and every R2."""
        from olive.passes.quantize.rotated import draw

        return draw(stream, params.rotate_mode, params.seed)


class QuaRot(Rotating["QuaRot.Params"]):
    """Turn the residual stream and the heads so that no channel stands out (Ashkboos et al. 2024).

    The model's function stays the same. Only what can be folded into weights is turned: the rotations inside
    MLP and keys would need a kernel of their own.
    """

    class Params(RotateParams):
        """What every rotating pass has."""
