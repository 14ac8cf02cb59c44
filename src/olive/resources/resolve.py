"""Where a model or adapter lies: a local folder, the local Hugging Face cache, or the hub."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from olive.errors import ConfigError, EnvironmentFault

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def locate(path_or_id: str, base_dir: Path, revision: str | None = None) -> Path:
    """The folder of a model that is already on this machine; never asks the network.

    Looks at the path below ``base_dir``, the path below the working folder, and the Hugging Face cache.

    Args:
        path_or_id: a local folder or a hub id.
        base_dir: the folder relative paths of the document start from.
        revision: branch, tag or commit of a hub model; default ``main``.

    Raises:
        ConfigError: it can only be a path, and there is none.
        EnvironmentFault: it may be a hub id, and the hub's model is not on this machine.
    """
    found, looked = _find(path_or_id, base_dir, revision)
    if found is not None:
        return found
    if not is_hub_id(path_or_id):
        message = f"there is no folder {path_or_id!r}; looked at {_join(looked)}"
        raise ConfigError(message, fix=_suggest(looked[0]))
    pinned = f" --revision {revision}" if revision else ""
    raise EnvironmentFault(
        f"{path_or_id!r} is not on this machine; looked at {_join(looked)}",
        fix="If it is a folder, check the spelling and the working folder. If it is a model of the hub, "
        f"`olive run --download FILE` fetches it first, and so does `hf download {path_or_id}{pinned}`.",
    )


def resolve(path_or_id: str, base_dir: Path, revision: str | None = None) -> Path:
    """The folder of a model, downloaded from the hub when it is not on this machine.

    Raises:
        ConfigError: it is neither a local folder nor a model or revision that the hub knows.
        EnvironmentFault: the hub cannot be reached, or asks for a licence to be accepted.
    """
    found, looked = _find(path_or_id, base_dir, revision)
    if found is not None:
        return found
    if not is_hub_id(path_or_id):
        return locate(path_or_id, base_dir, revision)  # raises
    return _download(path_or_id, revision, looked)


def is_hub_id(text: str) -> bool:
    """Whether a name can be a hub id: ``name`` or ``owner/name``."""
    return _ID.fullmatch(text) is not None and ".." not in text


def hub_cache() -> Path:
    """The folder of the Hugging Face cache, by its own environment variables."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _find(path_or_id: str, base_dir: Path, revision: str | None) -> tuple[Path | None, list[Path]]:
    given = Path(path_or_id).expanduser()
    looked = list(dict.fromkeys([(base_dir / given).absolute(), given.absolute()]))
    for path in looked:
        if path.is_dir():
            return path, looked
        if path.suffix in (".gguf", ".onnx") and path.is_file():
            return path, looked
        if path.exists():
            raise ConfigError(f"{path} is a file", fix="Name the folder that holds the model.")
    if is_hub_id(path_or_id):
        repository = hub_cache() / f"models--{path_or_id.replace('/', '--')}"
        looked.append(repository)
        return _snapshot(repository, revision or "main"), looked
    return None, looked


def _snapshot(repository: Path, revision: str) -> Path | None:
    """The cached snapshot of a revision, when it holds a config and every weight file."""
    commit = revision
    if not _COMMIT.fullmatch(revision):
        reference = repository / "refs" / revision
        if ".." in revision or not reference.is_file():
            return None
        commit = reference.read_text(encoding="ascii", errors="replace").strip()
        if not _COMMIT.fullmatch(commit):
            return None
    folder = repository / "snapshots" / commit
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether an interrupted download left nothing out; a link without its target is no file."""
    if (folder / "adapter_config.json").is_file():
        return (folder / "adapter_model.safetensors").is_file()
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(re.findall(r'"([^"/\\]+\.safetensors)"', index.read_text(encoding="utf-8")))
        return all((folder / name).is_file() for name in names)
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def _download(name: str, revision: str | None, looked: list[Path]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise EnvironmentFault(
            f"{name!r} is not on this machine (looked at {_join(looked)}), nor is huggingface_hub",
            fix='pip install "olive-next[cpu]"',
        ) from error
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED, etag_timeout=10))
    except GatedRepoError as error:
        raise EnvironmentFault(
            f"the hub gives {name!r} only to accounts that accepted its licence",
            fix="Accept it on the model's page and log in with `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name!r} is neither a folder (looked at {_join(looked[:-1])}) nor a public model of the hub",
            fix="Check the spelling; for a private model log in with `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        fix = "Check input_model.load_kwargs.revision."
        raise ConfigError(f"{name!r} has no revision {revision!r}", fix=fix) from error
    except OSError as error:
        raise EnvironmentFault(
            f"{name!r} is not on this machine (looked at {_join(looked)}), and the hub cannot be reached",
            fix="Connect to the network, or put the model into one of these folders.",
        ) from error
    if not _is_whole(folder):
        raise ConfigError(
            f"the hub's {name!r} holds no config.json with safetensors weights",
            fix="Name a revision that has them, or convert the model with `save_pretrained`.",
        )
    return folder


def _suggest(path: Path) -> str:
    """The closest name in the deepest folder that exists."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        path, folder = folder, folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    close = get_close_matches(path.name, names, n=1)
    if close:
        return f"Did you mean {folder / close[0]}?"
    return f"The deepest folder that exists is {folder}; it has no {path.name!r}."


def _join(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths)
