"""What the machine is: quickly, and within what its control groups leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from olive.hardware import probe as module
from olive.hardware.machine import Gpu, Machine
from olive.hardware.probe import (
    disk_free,
    execution_providers,
    installed,
    matrix_rate,
    probe,
    training_dtype,
)

GIB = 1 << 30


def machine(*, features: tuple[str, ...] = (), gpus: tuple[Gpu, ...] = ()) -> Machine:
    return Machine(
        system="Linux",
        cpu="x",
        cores=2,
        cpu_features=features,
        memory=GIB,
        memory_available=GIB,
        gpus=gpus,
        python="3.11",
    )


def gpu(capability: tuple[int, int] | None) -> Gpu:
    return Gpu(name="x", memory=GIB, compute_capability=capability)


def test_probe() -> None:
    found = probe()
    assert probe() is found
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert 0 < found.memory_available <= found.memory
    assert "CPUExecutionProvider" in found.execution_providers
    assert found.packages["pydantic"] == installed("pydantic")
    assert Machine.model_validate_json(found.model_dump_json()) == found


def test_probing_is_light() -> None:
    code = (
        "import sys, time; from olive.hardware.probe import probe\n"
        "start = time.perf_counter(); probe(); took = time.perf_counter() - start\n"
        "heavy = {'torch', 'onnxruntime', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert took < 0.5, took"  # 0.03 s when idle; the machine of a test run seldom is
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_installed() -> None:
    assert installed("pytest") == pytest.__version__
    assert installed("no-such-distribution-at-all") is None


def test_disk_free_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "a" / "b") == pytest.approx(disk_free(tmp_path), rel=0.05)
    assert disk_free(tmp_path) > 0


@pytest.mark.parametrize(
    ("device", "features", "gpus", "dtype"),
    [
        ("cpu", (), (), "float32"),
        ("cpu", ("avx2", "avx512f"), (), "float32"),
        ("cpu", ("avx512_bf16",), (), "bfloat16"),
        ("cpu", ("amx_tile", "amx_bf16"), (), "bfloat16"),
        ("gpu", (), (gpu((7, 5)),), "float16"),
        ("gpu", (), (gpu((8, 0)),), "bfloat16"),
        ("gpu", (), (gpu((12, 0)),), "bfloat16"),
        ("gpu", (), (gpu(None),), "float16"),
        ("gpu", (), (), "float16"),
    ],
)
def test_training_dtype(device: str, features: tuple[str, ...], gpus: tuple[Gpu, ...], dtype: str) -> None:
    assert training_dtype(machine(features=features, gpus=gpus), device) == dtype


def test_execution_providers_need_package_and_device() -> None:
    cuda = (gpu((8, 0)),)
    assert execution_providers({"onnxruntime": "1"}, cuda, "Linux") == ("CPUExecutionProvider",)
    assert execution_providers({"onnxruntime-gpu": "1"}, (), "Linux") == ("CPUExecutionProvider",)
    assert execution_providers({"onnxruntime-gpu": "1"}, cuda, "Linux")[0] == "CUDAExecutionProvider"
    assert execution_providers({"onnxruntime-directml": "1"}, (), "Linux") == ("CPUExecutionProvider",)
    assert execution_providers({"onnxruntime-directml": "1"}, (), "Windows")[0] == "DmlExecutionProvider"


def test_cpu_of_both_families(tmp_path: Path) -> None:
    intel = tmp_path / "intel"
    intel.write_text(
        "processor\t: 0\nmodel name\t: Xeon\ncpu MHz\t\t: 2500.5\n"
        "flags\t\t: fpu avx2 amx_bf16 avx512f\n\nprocessor: 1\n"
    )
    assert module._cpu(intel) == ("Xeon", ("avx2", "avx512f", "amx_bf16"), 2.5005e9)
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert module._cpu(arm)[1] == ("asimd", "bf16")
    assert module._cpu(tmp_path / "none")[1] == ()


def test_matrix_rate_is_that_of_the_multiply_add_units() -> None:
    changes = {"cpu": "Intel(R) Xeon(R)", "cores": 4, "clock": 3e9, "cpu_features": ("avx2", "avx512f")}
    here = probe().model_copy(update=changes)
    assert matrix_rate(here) == 4 * 3e9 * 32
    assert matrix_rate(here, "bfloat16") == 4 * 3e9 * 32
    assert matrix_rate(here.model_copy(update={"cpu": "AMD EPYC 9B45"})) == 4 * 3e9 * 64
    native = here.model_copy(update={"cpu_features": ("avx2", "avx512f", "avx512_bf16")})
    assert matrix_rate(native, "bfloat16") == 4 * 3e9 * 96
    assert matrix_rate(here.model_copy(update={"clock": 0.0})) is None
    assert matrix_rate(here.model_copy(update={"cpu_features": ()})) is None


def test_memory_within_a_version_2_control_group(tmp_path: Path) -> None:
    """A parent's limit binds too, and page cache that can be given back is not use."""
    group = tmp_path / "fs" / "outer" / "inner"
    group.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text(f"{GIB // 4}\n")
    (group.parent / "memory.current").write_text(f"{GIB // 8}\n")
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 16}\n")
    assert module._memory(membership, tmp_path / "fs") == (GIB // 4, GIB // 4 - GIB // 16)


def test_memory_within_a_version_1_control_group(tmp_path: Path) -> None:
    group = tmp_path / "fs" / "memory" / "job"
    group.mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/job\n3:cpuset:/\n0::/\n")
    (group / "memory.limit_in_bytes").write_text(f"{GIB // 4}")
    (group / "memory.usage_in_bytes").write_text(f"{GIB}")
    assert module._memory(membership, tmp_path / "fs") == (GIB // 4, 0)
    (group / "memory.limit_in_bytes").write_text(str((1 << 63) - 4096))  # how version 1 says unlimited
    assert module._memory(membership, tmp_path / "fs")[0] > GIB // 4
