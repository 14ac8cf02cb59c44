"""Headers of safetensors files: agreement with the reference implementation, and refusal of damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from olive.errors import ConfigError, UntrustedInput
from olive.models.tensors import INDEX, read_header, read_tensors, weight_files


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2, 3), offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_agrees_with_the_reference_implementation(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {
        "a.weight": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, 2, dtype=torch.int8),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "half": torch.zeros(1, dtype=torch.float16),
        "flag": torch.zeros(3, dtype=torch.bool),
        "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with safe_open(path, framework="pt") as file:
        expected = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in tensors
        }
    assert read_header(path) == expected


def test_truncation_is_found_at_every_length(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.safetensors", {"w": entry()}, bytes(24)).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UntrustedInput, match="truncated"):
            read_header(path)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"[1, 2]", b""),
        (b"{", b""),
        (b"\xff\xfe", b""),
        (b"[" * 100_000, b""),
        ({"w": entry(offsets=(0, 20))}, bytes(20)),  # shorter than the shape
        ({"w": entry(offsets=(4, 28))}, bytes(28)),  # a hole
        ({"w": entry(), "v": entry(offsets=(12, 36))}, bytes(36)),  # an overlap
        ({"w": entry(shape=(-2, -3))}, bytes(24)),
        ({"w": entry(shape=(1 << 62, 1 << 62))}, bytes(24)),
        ({"w": entry(dtype="PICKLE")}, bytes(24)),
        ({"w": entry(offsets=(24, 0))}, bytes(24)),
        ({"w": entry(offsets=(0.0, 24.0))}, bytes(24)),
        ({"w": entry(offsets=(0,))}, bytes(24)),
        ({"w": 3}, b""),
        ({"w": entry()}, bytes(25)),  # bytes after the last tensor
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(UntrustedInput, match="no sound safetensors"):
        read_header(write(tmp_path / "x.safetensors", header, data))


def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UntrustedInput, match="claims"):
        read_header(write(tmp_path / "x.safetensors", b"{}", length=1 << 60))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 200), bit=st.integers(0, 7))
@example(position=0, bit=0)
def test_a_flipped_bit_never_escapes_the_typed_errors(tmp_path: Path, position: int, bit: int) -> None:
    """Row 42 of the fault matrix: a hostile byte leads to a result or to a typed error, nothing else."""
    path = write(tmp_path / "x.safetensors", {"w": entry(), "v": entry(offsets=(24, 48))}, bytes(48))
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    try:
        read_header(path)
    except UntrustedInput:
        return


def shards(folder: Path, names: dict[str, str]) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"w": entry()}, bytes(24))
    write(tmp_path / "b.safetensors", {"v": entry()}, bytes(24))
    write(tmp_path / "stray.safetensors", {"u": entry()}, bytes(24))
    shards(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})
    assert [path.name for path in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]
    assert read_tensors(tmp_path) == {"w": ("F32", (2, 3)), "v": ("F32", (2, 3))}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"w": entry()}, bytes(24))
    shards(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 files its index names: b\.safetensors"):
        read_tensors(tmp_path)


def test_an_index_that_names_absent_tensors(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"w": entry()}, bytes(24))
    with pytest.raises(UntrustedInput, match="'v'"):
        read_tensors(shards(tmp_path, {"w": "a.safetensors", "v": "a.safetensors"}))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "C:\\x.safetensors", "weights.bin", ""],
)
def test_an_index_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UntrustedInput, match="no safetensors file of this folder"):
        read_tensors(shards(tmp_path, {"w": name}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_unreadable_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UntrustedInput, match="unreadable"):
        read_tensors(tmp_path)
