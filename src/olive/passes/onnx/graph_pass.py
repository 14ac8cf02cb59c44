"""What passes on ONNX graphs share."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from olive.config.base import PassParams
from olive.models.artifact import Kind
from olive.passes.base import Pass

P = TypeVar("P", bound=PassParams)


class GraphPass(Pass[P]):
    """A pass that changes an ONNX graph: a plain one stays one, a bundle of onnxruntime-genai stays one."""

    accepts: ClassVar[tuple[Kind, ...]] = (Kind.ONNX, Kind.GENAI)
    produces: ClassVar[Kind] = Kind.ONNX
    libraries: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")
    gates: ClassVar[tuple[str, ...]] = ("graph",)
    hardware: ClassVar[tuple[str, ...]] = ("execution_provider",)
    keeps_kind: ClassVar[bool] = True

    @classmethod
    def gates_of(cls, given: Kind) -> tuple[str, ...]:
        """A bundle is held as an export is; a plain graph against the one it was made of."""
        return ("parity", "bundle") if given is Kind.GENAI else cls.gates
