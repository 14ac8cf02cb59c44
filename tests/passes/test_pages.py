"""Mapped weights leave memory and come back unchanged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from olive.passes.export.pages import let_go, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) << 10
    raise AssertionError(kind)


def test_a_mapped_tensor_leaves_and_reads_the_same(tmp_path: Path) -> None:
    wanted = torch.arange(8 << 20, dtype=torch.float32)
    save_file({"w": wanted}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as opened:
        tensor = opened.get_tensor("w")
        assert tensor.equal(wanted)
        before = resident("RssFile")
        assert let_go(tensor, mapped(".safetensors")) > 31 << 20
        assert before - resident("RssFile") > 24 << 20
        assert tensor.equal(wanted)
        # a changed page is ours alone and must not be lost
        tensor[5] = -1
        let_go(tensor, mapped(".safetensors"))
        assert tensor[5] == -1
        assert tensor[6] == 6


def test_pages_that_another_mapping_holds_too_leave_where_nothing_was_written(tmp_path: Path) -> None:
    save_file({"w": torch.arange(8 << 20, dtype=torch.float32)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", framework="pt") as opened:
        tensor = opened.get_tensor("w")
        total = tensor.sum()
        before = resident("RssFile")
        assert let_go(tensor, mapped(str(tmp_path / "w.safetensors")), unchanged=True) > 31 << 20
        assert before - resident("RssFile") > 24 << 20
        assert tensor.sum() == total


def test_other_memory_is_left_alone() -> None:
    assert let_go(torch.ones(1 << 20), mapped(".safetensors")) == 0
    assert let_go(torch.ones(1 << 20), []) == 0
