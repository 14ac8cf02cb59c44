"""A working folder with two tiny models: ``model``, and ``chat`` with a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models: ``plain``, and ``chat`` with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_phi3(folder / "plain")
    shutil.copytree(folder / "plain", folder / "chat")
    tiny.tiny_tokenizer(folder / "chat", chat_template=CHAT)
    return folder


@pytest.fixture
def work(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(models / "plain", target_is_directory=True)
    (tmp_path / "chat").symlink_to(models / "chat", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
