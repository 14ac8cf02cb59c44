"""What this machine is: small values, probed without a heavy import."""

from __future__ import annotations

from pydantic import Field

from olive.config.base import Frozen


class Gpu(Frozen):
    """One accelerator.

    Attributes:
        name: as the driver says.
        memory: total bytes.
        compute_capability: (major, minor) for CUDA devices.
    """

    name: str
    memory: int
    compute_capability: tuple[int, int] | None = None


class Machine(Frozen):
    """The machine a job would run on.

    Attributes:
        cpu: model name.
        cores: logical processors this process may use.
        clock: hertz now, 0 where the system does not say.
        cpu_features: flags such as ``avx512_bf16`` and ``amx_bf16``.
        memory: total bytes (the cgroup's limit where it is lower).
        memory_available: bytes free for this process.
        gpus: accelerators with a working driver.
        execution_providers: what the installed onnxruntime brings and the devices here can run.
        packages: distribution -> installed version, for the distributions the product knows.
    """

    system: str
    cpu: str
    cores: int
    cpu_features: tuple[str, ...] = ()
    clock: float = 0.0
    memory: int
    memory_available: int
    gpus: tuple[Gpu, ...] = ()
    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    python: str
    packages: dict[str, str] = Field(default_factory=dict)
