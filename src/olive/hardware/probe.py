"""Find out what this machine is, in milliseconds: from the kernel, the driver and package metadata."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from olive.config.base import Dtype
from olive.hardware.machine import Gpu, Machine
from olive.hardware.tested import KNOWN

_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "sve", "bf16", "i8mm"),
)
_UNLIMITED = 1 << 60


@cache
def probe() -> Machine:
    """This machine, probed once a process. Imports nothing heavy."""
    packages = {name: found for name in KNOWN if (found := installed(name)) is not None}
    total, available = _memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    cpu, features, clock = _cpu(Path("/proc/cpuinfo"))
    gpus = _nvidia()
    return Machine(
        system=platform.system(),
        cpu=cpu,
        cores=_cores(),
        cpu_features=features,
        clock=clock,
        memory=total,
        memory_available=available,
        gpus=gpus,
        execution_providers=execution_providers(packages, gpus, platform.system()),
        python=platform.python_version(),
        packages=packages,
    )


def memory_available() -> int:
    """Bytes free for this process now."""
    return _memory(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))[1]


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def disk_free(path: Path) -> int:
    """Bytes free to this user on the file system that ``path`` is, or would be, on."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def training_dtype(machine: Machine, device: str) -> Dtype:
    """The dtype to train in: the fastest one that the device multiplies natively.

    A CPU with bfloat16 dot products (``avx512_bf16``, AMX tiles) does two to four times as many of them as in
    float32. A GPU of compute capability 8.0 or later takes bfloat16, an older one float16.
    """
    if device == "cpu":
        return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(machine.cpu_features) else "float32"
    capability = machine.gpus[0].compute_capability if machine.gpus else None
    return "bfloat16" if capability is not None and capability >= (8, 0) else "float16"


def matrix_rate(machine: Machine, dtype: Dtype = "float32") -> float | None:
    """FLOP/s that this CPU's multiply-add units can do at its clock; None where that is not known.

    Two units of 8 lanes with AVX2, two of 4 with Arm's ASIMD. AVX-512 counts double on AMD; on others it
    counts as AVX2, since many split its products or lower their clock. Where bfloat16 is native, it counts
    three times: twice the lanes in AVX-512 on any, and more with tiles.
    """
    lanes = 8 if "avx2" in machine.cpu_features else 4 if "asimd" in machine.cpu_features else 0
    if machine.cpu.startswith("AMD") and "avx512f" in machine.cpu_features:
        lanes *= 2
    if dtype == "bfloat16" and training_dtype(machine, "cpu") == "bfloat16":
        lanes = 24
    return machine.cores * machine.clock * lanes * 2 * 2 or None


def execution_providers(packages: Mapping[str, str], gpus: tuple[Gpu, ...], system: str) -> tuple[str, ...]:
    """What the installed builds of ONNX Runtime bring and the devices here can run, best first."""
    found = []
    cuda = any(gpu.compute_capability for gpu in gpus)
    if cuda and packages.keys() & {"onnxruntime-gpu", "onnxruntime-genai-cuda"}:
        found.append("CUDAExecutionProvider")
    if system == "Windows" and packages.keys() & {"onnxruntime-directml", "onnxruntime-genai-directml"}:
        found.append("DmlExecutionProvider")
    if "onnxruntime-openvino" in packages:
        found.append("OpenVINOExecutionProvider")
    return (*found, "CPUExecutionProvider")


def _cores() -> int:
    """Processors this process may use: its affinity, and the control group's quota where that is lower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def _cpu(cpuinfo: Path) -> tuple[str, tuple[str, ...], float]:
    """Model name, the features that matter here, and the clock in hertz."""
    name, flags, clock = "", set[str](), 0.0
    for line in _read(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        key = key.strip().lower()
        if key == "model name":
            name = name or value.strip()
        elif key == "cpu mhz":
            clock = 1e6 * float(value)
        elif key in ("flags", "features"):
            flags = set(value.split())
            break
    known = tuple(feature for feature in _FEATURES if feature in flags)
    return name or platform.processor() or platform.machine(), known, clock


def _memory(membership: Path, root: Path) -> tuple[int, int]:
    """(total, available) bytes: the machine's, or what the control group leaves where that is lower."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for folder, names in _groups(membership, root):
        limit = _number(folder / names[0])
        if limit is None or limit >= min(_UNLIMITED, total):
            continue
        # The page cache counts as use but is given back under pressure.
        reclaimable = 0
        for line in _read(folder / "memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key in ("inactive_file", "total_inactive_file"):
                reclaimable = max(reclaimable, int(value))
        used = max(0, (_number(folder / names[1]) or 0) - reclaimable)
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _groups(membership: Path, root: Path) -> list[tuple[Path, tuple[str, str]]]:
    """Control groups that bound this process's memory, each with the names of its limit and its use."""
    found = []
    for line in _read(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        parts = Path(path.lstrip("/"))
        chain = [parts, *parts.parents]
        if controllers == "":
            found += [(root / part, ("memory.max", "memory.current")) for part in chain]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += [(root / "memory" / part, names) for part in chain]
    return found


def _nvidia() -> tuple[Gpu, ...]:
    """NVIDIA devices, asked of the driver's management library; empty without one."""
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    try:
        nvml = ctypes.CDLL(name)
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = (_nvidia_device(nvml, index) for index in _visible(count.value))
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        nvml.nvmlShutdown()


def _visible(count: int) -> list[int]:
    """Numbers of the devices that CUDA_VISIBLE_DEVICES leaves; as many where it names them otherwise."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(range(count))
    names = [name.strip() for name in named.split(",") if name.strip()]
    if all(name.isdigit() for name in names):
        return [int(name) for name in names if int(name) < count]
    return list(range(min(count, len(names))))


class _NvmlMemory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def _nvidia_device(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle, memory, name = ctypes.c_void_p(), _NvmlMemory(), ctypes.create_string_buffer(96)
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
        return None
    nvml.nvmlDeviceGetName(handle, name, 96)
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    known = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    return Gpu(
        name=name.value.decode("utf-8", "replace"),
        memory=memory.total,
        compute_capability=(major.value, minor.value) if known else None,
    )


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
