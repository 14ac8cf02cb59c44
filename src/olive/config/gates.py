"""Gates between the steps of a document."""

from __future__ import annotations

from pydantic import Field

from olive.config.base import Frozen


class MergeGate(Frozen):
    """Thresholds of the merge gate; KL in nat a token."""

    enabled: bool = Field(True, description="Whether the gate holds.")
    max_kl: float | None = Field(None, gt=0, description="Default: by dtype; 1e-6 in float32.")


class ParityGate(Frozen):
    """Thresholds of the parity gate; KL in nat a token."""

    enabled: bool = Field(True, description="Whether the gate holds.")
    max_kl: float | None = Field(None, gt=0, description="Default: by precision; catches what is broken.")
    min_top1: float | None = Field(None, ge=0, le=1, description="Share of positions whose top token agrees.")
    prompts: int = Field(8, ge=1, le=256, description="How many prompts to compare on.")


class BundleGate(Frozen):
    """The final folder loads and generates in a clean process."""

    enabled: bool = Field(True, description="Whether the gate holds.")


class IntegersGate(Frozen):
    """What is written in another tool's format has the integers it came from."""

    enabled: bool = Field(True, description="Whether the gate holds.")


class GraphGate(Frozen):
    """A changed ONNX graph gives what the graph before it gave, on the same inputs."""

    enabled: bool = Field(True, description="Whether the gate holds.")
    max_error: float | None = Field(
        None,
        gt=0,
        description="Relative error of an output (root of the mean square). Default: by precision; catches "
        "what is broken.",
    )
    samples: int = Field(4, ge=1, le=64, description="How many inputs to compare on.")


class EquivalenceGate(Frozen):
    """Thresholds of the equivalence gate; KL in nat a token."""

    enabled: bool = Field(True, description="Whether the gate holds.")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="Default: by the stored dtype; 1e-6 in float32, 1e-3 in float16, 0.01 in bfloat16.",
    )


class Gates(Frozen):
    """Checks between stages."""

    merge: MergeGate = Field(MergeGate(), description="The merged model is base plus adapter.")
    parity: ParityGate = Field(ParityGate(), description="The exported model answers as its source.")
    bundle: BundleGate = Field(BundleGate(), description="The final folder loads and generates.")
    integers: IntegersGate = Field(
        IntegersGate(), description="A model saved in another format, read again, has the same integers."
    )
    graph: GraphGate = Field(GraphGate(), description="A changed graph gives what it gave before.")
    equivalence: EquivalenceGate = Field(
        EquivalenceGate(), description="A rotated model predicts what it predicted before."
    )
