"""Where a model lies: local folder, cache of the hub, or a message that says where it was looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olive.errors import ConfigError, EnvironmentFault
from olive.resources.resolve import hub_cache, is_hub_id, locate, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def cached(tmp_path: Path, *files: str, reference: str | None = "main") -> Path:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in files:
        (snapshot / file).write_text("{}")
    if reference:
        (repository / "refs").mkdir()
        (repository / "refs" / reference).write_text(COMMIT)
    return snapshot


def test_the_documents_folder_goes_before_the_working_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (tmp_path / "cwd" / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name", base) == tmp_path / "cwd" / "owner" / "name"
    (base / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name", base) == base / "owner" / "name"
    assert locate(str(base), tmp_path) == base


def test_a_model_that_is_not_here_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        locate("owner/name", tmp_path, COMMIT)
    assert "`olive run --download FILE`" in str(caught.value)
    assert f"`hf download owner/name --revision {COMMIT}`" in str(caught.value)


def test_a_missing_path_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "model-cache" / "microsoft" / "phi-3-mini").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        locate("model-cache/microsoft/phi3-mini", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "model-cache" / "microsoft" / "phi3-mini") in message
    assert str(tmp_path / "cwd") in message
    assert f"Did you mean {tmp_path / 'model-cache' / 'microsoft' / 'phi-3-mini'}?" in message


def test_the_deepest_existing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The deepest folder that exists is .*; it has no 'zzz'"):
        locate("zzz/b/c", tmp_path)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigError, match="is a file"):
        locate("model.bin", tmp_path)


def test_a_gguf_file_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert locate("model.gguf", tmp_path) == tmp_path / "model.gguf"


def test_a_cached_hub_model(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "config.json", "model.safetensors")
    assert locate("owner/name", tmp_path) == snapshot
    assert locate("owner/name", tmp_path, COMMIT) == snapshot
    assert resolve("owner/name", tmp_path) == snapshot
    with pytest.raises(EnvironmentFault):
        locate("owner/name", tmp_path, "other-branch")


@pytest.mark.parametrize("files", [(), ("config.json",), ("model.safetensors",)])
def test_a_part_of_a_hub_model_is_not_enough(tmp_path: Path, files: tuple[str, ...]) -> None:
    cached(tmp_path, *files)
    with pytest.raises(EnvironmentFault, match="not on this machine"):
        locate("owner/name", tmp_path)


def test_missing_shards_and_dangling_links_are_missing_files(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "config.json", "a.safetensors")
    index = '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    (snapshot / "model.safetensors.index.json").write_text(index)
    (snapshot / "b.safetensors").symlink_to("../../blobs/absent")
    with pytest.raises(EnvironmentFault):
        locate("owner/name", tmp_path)
    (snapshot / "b.safetensors").unlink()
    (snapshot / "b.safetensors").touch()
    assert locate("owner/name", tmp_path) == snapshot


def test_a_revision_cannot_leave_the_cache(tmp_path: Path) -> None:
    cached(tmp_path, "config.json", "model.safetensors")
    (tmp_path / "secret").write_text(COMMIT)
    with pytest.raises(EnvironmentFault):
        locate("owner/name", tmp_path, "../../../secret")


@pytest.mark.parametrize(
    ("text", "hub"),
    [
        ("gpt2", True),
        ("microsoft/Phi-3-mini-4k-instruct", True),
        ("a/b/c", False),
        ("./a", False),
        ("../a", False),
        ("/a/b", False),
        ("~/a", False),
        ("a/..", False),
        ("C:\\a", False),
        ("", False),
    ],
)
def test_is_hub_id(text: str, hub: bool) -> None:
    assert is_hub_id(text) is hub


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/x"}, "/x"),
        ({"HF_HOME": "/x"}, "/x/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_hub_cache(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(expected)


def hub_error(name: str) -> Exception:
    """An error of the hub's client, made without its constructor, which wants a real answer of the hub."""
    from huggingface_hub import errors

    kind: Any = getattr(errors, name)
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("GatedRepoError", EnvironmentFault, "licence"),
        ("RepositoryNotFoundError", ConfigError, "nor a public model"),
        ("RevisionNotFoundError", ConfigError, "no revision 'v9'"),
        ("LocalEntryNotFoundError", EnvironmentFault, "cannot be reached"),
        ("OfflineModeIsEnabled", EnvironmentFault, "cannot be reached"),
    ],
)
def test_failed_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, error: type[Exception], message: str
) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise hub_error(failure)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=message):
        resolve("owner/name", tmp_path, "v9")


def test_a_download_takes_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no config\.json with safetensors weights"):
        resolve("owner/name", tmp_path / "x", COMMIT)
    (tmp_path / "model.safetensors").write_text("{}")
    assert resolve("owner/name", tmp_path / "x", COMMIT) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", COMMIT)
    assert not {"*.bin", "*.pt", "*"} & set(asked["allow_patterns"])


def test_nothing_but_a_hub_id_is_ever_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ConfigError):
        resolve("a/b/c", tmp_path)
