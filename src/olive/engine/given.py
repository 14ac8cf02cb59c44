"""The model that a document starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from olive.config.loader import Loaded
from olive.config.workflow import OnnxModel, Workflow
from olive.errors import ConfigError, EnvironmentFault, OliveError, Problem, Severity
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.foreign.gguf_folder import unfolded
from olive.models.graph import describe_graph
from olive.models.hf import describe, native_architecture, needs_remote_code
from olive.resources.digest import files_digest, folder_digest
from olive.resources.resolve import locate


def _graph_input(loaded: Loaded, root: Path) -> tuple[ModelInfo, Artifact]:
    """A graph and the files that belong to it: those of its folder, unless one file of it is named."""
    given, memo = loaded.workflow.input_model, root / "digests.json"
    assert isinstance(given, OnnxModel)  # noqa: S101 - the caller has looked
    try:
        path = locate(given.model_path, loaded.base_dir)
    except EnvironmentFault as error:
        if not given.model_path.endswith(".onnx"):
            raise
        raise ConfigError(
            f"there is no file {given.model_path}",
            where="input_model.model_path",
            fix="Check the spelling and the folder: relative paths start from the working folder.",
        ) from error
    if path.is_dir() and (path / "genai_config.json").is_file() and given.onnx_file_name is None:
        return describe(path), Artifact(kind=Kind.GENAI, path=path, digest=folder_digest(path, memo))
    folder = path if path.is_dir() else path.parent
    found = sorted(item.name for item in folder.glob("*.onnx"))
    file = given.onnx_file_name or (path.name if path.is_file() else found[0] if len(found) == 1 else None)
    if file is None or not (folder / file).is_file():
        raise ConfigError(
            f"{folder} holds {', '.join(found) or 'no .onnx file'}"
            + (f", and no {file}" if file else ": which one is meant is not said"),
            where="input_model",
            fix="Name the file in model_path.",
        )
    info = describe_graph(folder, file)
    if path.is_dir() and len(found) == 1:
        return info, Artifact(kind=Kind.ONNX, path=folder, digest=folder_digest(folder, memo))
    assert info.graph is not None  # noqa: S101 - describe_graph gives one
    digest = files_digest(folder, [file, *info.graph.files], memo)
    return info, Artifact(kind=Kind.ONNX, path=folder, digest=digest, attributes={"file": file})


def _artifact(loaded: Loaded, folder: Path, root: Path) -> Artifact:
    """The input model, digested."""
    memo = root / "digests.json"
    given = loaded.workflow.input_model
    base = Artifact(kind=Kind.HF, path=folder, digest=folder_digest(folder, memo))
    if given.adapter_path is None:
        return base
    adapter = locate(given.adapter_path, loaded.base_dir)
    return Artifact(kind=Kind.ADAPTER, path=adapter, digest=folder_digest(adapter, memo), base=base)


def given_model(
    loaded: Loaded, root: Path, findings: list[Problem]
) -> tuple[ModelInfo | None, Artifact | None]:
    """What the input model is, and the model itself, digested; neither where there is an error.

    Args:
        loaded: the document.
        root: the store's folder.
        findings: takes the errors.
    """
    given = loaded.workflow.input_model
    try:
        if isinstance(given, OnnxModel):
            return _graph_input(loaded, root)
        folder = unfolded(locate(given.model_path, loaded.base_dir, given.load_kwargs.revision), root)
        info, model = describe(folder), _artifact(loaded, folder, root)
        if model.kind is Kind.ADAPTER:
            info = info.model_copy(update={"adapter": model.path})
        return info, model
    except OliveError as error:
        findings.extend(error.problems)
        return None, None


def check_trust(workflow: Workflow, info: ModelInfo) -> Iterator[Problem]:
    """Code that the model's folder brings runs only where the document says so."""
    if info.kind in (Kind.ONNX, Kind.GENAI):
        return
    kwargs = workflow.input_model.load_kwargs
    native = native_architecture(info)
    if kwargs.trust_remote_code and native:
        yield Problem(
            f"trust_remote_code has no effect: transformers knows {info.architecture} itself",
            "input_model.load_kwargs",
            "Drop it.",
            Severity.NOTE,
        )
    elif not native and needs_remote_code(info.config):
        pinned = kwargs.revision is not None and len(kwargs.revision) == 40
        if not (kwargs.trust_remote_code and pinned):
            yield Problem(
                f"{info.architecture} runs code from the model's folder",
                "input_model.load_kwargs",
                "Read the code, then set trust_remote_code: true and a revision of 40 hex digits.",
                exit_code=6,
            )
