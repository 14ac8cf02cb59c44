"""``olive cache``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olive.cli.arguments import byte_count, seconds
from olive.cli.main import entry
from olive.store.keys import key
from olive.store.store import Store


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    store = Store(tmp_path / "cache")
    for rank in (8, 16):
        parts = {"pass": "LoRA", "params": {"r": rank, "hf_token": "correct horse"}}
        with store.stage() as staging:
            (staging.path / "weights").write_bytes(bytes(1000 * rank))
            meta = {"step": f"lora{rank}", "type": "LoRA", "kind": "adapter", "seconds": 12.0}
            store.publish(staging, key(parts), meta, parts)
    store.close()
    return store.root


def run(capsys: pytest.CaptureFixture[str], cache: Path, *arguments: str) -> tuple[int, str, str]:
    code = entry(["cache", *arguments, "--cache-dir", str(cache)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_ls(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, cache, "ls")
    assert code == 0
    assert out.splitlines()[-1].startswith("2 results, 24.0 kB in ")
    for words in ("lora8", "lora16", "8.00 kB", "16.0 kB", "12 s", "just now"):
        assert words in out
    code, out, _ = run(capsys, cache, "ls", "--json")
    assert {entry["step"] for entry in json.loads(out)} == {"lora8", "lora16"}


def test_explain(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [entry["key"] for entry in json.loads(run(capsys, cache, "ls", "--json")[1])]
    code, out, _ = run(capsys, cache, "explain", keys[0][:12])
    assert code == 0
    assert keys[0] in out
    assert "params.r: " in out
    assert "correct horse" not in out
    code, out, _ = run(capsys, cache, "explain", *keys)
    assert code == 0
    assert out.strip() in ("params.r: 8 -> 16", "params.r: 16 -> 8")
    code, _, told = run(capsys, cache, "explain", "zzz")
    assert (code, "no result has a key that starts with zzz" in told) == (2, True)
    assert run(capsys, cache, "explain", *keys, "x")[0] == 2


def test_verify_finds_damage(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, cache, "verify")[:2] == (0, f"2 results in {cache} are whole\n")
    damaged = next(cache.glob("entries/*/*/weights"))
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    code, out, _ = run(capsys, cache, "verify")
    assert code == 5
    assert "damaged" in out
    assert "1 results in" in out


def test_gc(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, cache, "gc")[0] == 0
    assert "2 results" in run(capsys, cache, "ls")[1]
    code, out, _ = run(capsys, cache, "gc", "--max-size", "20kB")
    assert code == 0
    assert "1 results" in run(capsys, cache, "ls")[1]
    assert out.startswith("freed ")
    assert run(capsys, cache, "gc", "--older-than", "0s")[0] == 0
    assert "0 results, 0 B" in run(capsys, cache, "ls")[1]


@pytest.mark.parametrize(
    ("text", "count"),
    [("500", 500), ("500MB", 500_000_000), ("10G", 10**10), ("1.5GiB", 1_610_612_736), ("2 kb", 2000)],
)
def test_byte_count(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize(("text", "span"), [("30s", 30), ("12h", 43_200), ("7d", 604_800), ("2", 172_800)])
def test_seconds(text: str, span: float) -> None:
    assert seconds(text) == span
