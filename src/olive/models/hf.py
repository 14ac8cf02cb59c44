"""Hugging Face model folders: describe without torch, load, save."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.config.base import Dtype
from olive.errors import ConfigError, EnvironmentFault, UntrustedInput
from olive.hardware.probe import installed, probe
from olive.hardware.products import choose_products
from olive.hardware.tested import version_tuple
from olive.models.artifact import Kind, ModelInfo
from olive.models.foreign.opened import open_tensors, view_of
from olive.models.graph import describe_bundle
from olive.models.quantised import method_of
from olive.models.stream import LazyTensors
from olive.models.tensors import read_header, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_UNPORTABLE = frozenset({"_name_or_path", "quantization_config"})
_EMBEDDINGS = re.compile(r"(^|\.|_)(embeddings?|embed_tokens|embed_positions|embed_in|wte|wpe|shared)$")


def describe(folder: Path) -> ModelInfo:
    """What a model folder holds, from its JSON files and tensor headers alone.

    Raises:
        ConfigError: no such folder, no config, or no weights.
        UntrustedInput: pickled weights only, or a truncated or malformed file.
    """
    if not folder.is_dir():
        what = "is a file, not a model folder" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder} {what}", fix="Name a folder that `save_pretrained` wrote, or a hub id.")
    template = _has_chat_template(folder)
    if (folder / "genai_config.json").is_file():
        return describe_bundle(folder, read_json(folder / "genai_config.json"), template)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        config = read_json(folder / "adapter_config.json")
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise _no_weights(folder)
        return ModelInfo(
            path=folder,
            kind=Kind.ADAPTER,
            config=config,
            tensors=read_header(weights),
            chat_template=template,
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} has no config.json, so it is no Hugging Face model",
            fix=f"It holds: {_listing(folder)}. Name the folder that holds config.json and *.safetensors.",
        )
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder)
    notes: tuple[str, ...] = ()
    if (view := view_of(folder, config)) is not None:
        config, notes = view.config(config), tuple(view.notes)
        tensors = {name: part.layout for name, part in view.parts.items()}
    if not tensors:
        raise _no_weights(folder)
    return ModelInfo(
        path=folder, kind=Kind.HF, config=config, tensors=tensors, chat_template=template, notes=notes
    )


def _no_weights(folder: Path) -> ConfigError | UntrustedInput:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return UntrustedInput(
            f"{folder} has its weights only as pickle ({', '.join(pickles[:3])}): loading it can run code",
            fix="Use the safetensors form of the model.",
        )
    return ConfigError(
        f"{folder} holds no weights (*.safetensors)",
        fix=f"It holds: {_listing(folder)}. Complete the copy or the download.",
    )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: the file is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}", fix="Copy or download the file again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object", fix="Copy or download the file again.")
    return value


def open_model(folder: Path) -> tuple[LazyTensors, dict[str, Any]]:
    """The tensors of a model folder and its config in our terms, whatever format it is stored in.

    Raises:
        ConfigError: a format that is not read here, or a damaged one.
    """
    return open_tensors(folder, read_json(folder / "config.json"))


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_json(path).get("chat_template"))


def linear_modules(info: ModelInfo) -> dict[str, int]:
    """Last name of every weight matrix that is no embedding -> how many the model has.

    For a Phi-3: ``{"o_proj": 32, "qkv_proj": 32, "gate_up_proj": 32, "down_proj": 32, "lm_head": 1}``.
    """
    names = (name.removesuffix(".weight") for name, (_, shape) in info.tensors.items() if len(shape) == 2)
    return dict(Counter(name.rpartition(".")[2] for name in names if not _EMBEDDINGS.search(name)))


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether the model's config points to classes that its own folder brings."""
    return bool(config.get("auto_map"))


def native_architecture(info: ModelInfo) -> bool:
    """Whether the installed transformers has this architecture itself; found without importing it."""
    if not (model_type := info.config.get("model_type")) or not info.architecture:
        return False
    pair = rf"\(\s*{re.escape(json.dumps(model_type))},\s*{re.escape(json.dumps(info.architecture))},?\s*\)"
    return re.search(pair, _auto_models()) is not None


@cache
def _auto_models() -> str:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return ""
    path = Path(spec.submodule_search_locations[0], "models", "auto", "modeling_auto.py")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def load_model(
    folder: Path,
    *,
    dtype: Dtype,
    device: str = "cpu",
    attn_implementation: str | None = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode; only safetensors are read.

    Args:
        folder: a local folder.
        dtype: of the weights in memory; of a model stored as integers, what they are expanded to.
        device: ``cpu``, ``cuda``, ``gpu`` (the same) or ``cuda:N``.
        attn_implementation: as transformers names it; None for the model's own default.
        trust_remote_code: run the folder's own code; ignored when transformers has the architecture itself.

    Raises:
        ConfigError, UntrustedInput: as ``describe``; weights that do not fit the config; code without leave.
        EnvironmentFault: transformers is missing, or does not know the architecture.
    """
    info = describe(folder)
    native = native_architecture(info)
    if not native and needs_remote_code(info.config) and not trust_remote_code:
        raise UntrustedInput(
            f"{folder} brings its own code for {info.architecture}, and the installed transformers has none",
            fix="Read that code, then set trust_remote_code: true and a revision of 40 hex digits.",
        )
    with _transformers() as transformers, _failures_typed(info):
        import torch

        machine = probe()
        choose_products(machine.cpu, machine.cpu_features)
        if view_of(folder, stored := read_json(folder / "config.json")) or method_of(stored):
            from olive.models.skeleton import load_expanded

            expanded = load_expanded(folder, dtype, attn_implementation)
            return expanded.to("cuda" if device == "gpu" else device)
        options: dict[str, Any] = {_dtype_argument(): getattr(torch, dtype), "low_cpu_mem_usage": True}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=trust_remote_code and not native,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the name of the tensor
            output_loading_info=True,
            **options,
        )
    _check_complete(info, report)
    return model.to("cuda" if device == "gpu" else device).eval()


@contextmanager
def _failures_typed(info: ModelInfo) -> Iterator[None]:
    """Say who must act on what transformers raises; running out of memory passes through."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ImportError as error:
        raise EnvironmentFault(f"{info.path} needs a package that is missing: {_line(error)}") from error
    except (StrictDataclassError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{info.path / 'config.json'} is wrong: {_line(error)}") from error
    except (ValueError, OSError) as error:
        if native_architecture(info):
            raise ConfigError(f"{info.path} does not load: {_line(error)}") from error
        raise EnvironmentFault(
            f"transformers {installed('transformers')} does not know {info.architecture or info.path.name}",
            fix="pip install --upgrade transformers",
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _check_complete(info: ModelInfo, report: Mapping[str, Any]) -> None:
    """Refuse what transformers only warns of: a weight it invented, or a layer it dropped."""
    unexpected = [
        name for name in report.get("unexpected_keys", ()) if re.search(r"\blayers\.\d+\.", str(name))
    ]
    for found, what in (
        (report.get("mismatched_keys", ()), "has the wrong shape for"),
        (report.get("missing_keys", ()), "has no"),
        (unexpected, "has more layers than its config says:"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in found)
        if names:
            raise ConfigError(
                f"{info.path} {what} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}",
                fix=f"config.json says {info.architecture}; check that config and weights belong together.",
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder; never runs code from it.

    Raises:
        ConfigError: the folder has no readable tokenizer.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(f"{folder} has no tokenizer", fix="Add tokenizer.json and tokenizer_config.json.")
    with _transformers() as transformers:
        try:
            load = transformers.AutoTokenizer.from_pretrained
            return load(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"the tokenizer of {folder} does not load: {_line(error)}") from error


def save_model(model: PreTrainedModel, tokenizer_folder: Path, out: Path) -> None:
    """Write a model as safetensors with the tokenizer files of ``tokenizer_folder``.

    The config is written so that transformers 4 and 5 and onnxruntime-genai read the same model from it, and
    so that equal models make equal bytes: no path of this machine, no note of a quantiser that is gone.
    """
    with _transformers():
        model.save_pretrained(out, max_shard_size="4GB")
    finish_folder(out, tokenizer_folder)


def finish_folder(out: Path, tokenizer_folder: Path) -> None:
    """Give a folder of weights and config the tokenizer of another, and a portable config."""
    copy_tokenizer(tokenizer_folder, out)
    config = portable_config(read_json(out / "config.json"))
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    given = tokenizer_folder / "generation_config.json"
    if given.is_file():
        (out / "generation_config.json").write_bytes(given.read_bytes())


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config in the spelling of transformers 4 and 5 at once, without traces of this machine."""
    portable = {name: value for name, value in config.items() if name not in _UNPORTABLE}
    rope = portable.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:  # flat: one rotary embedding for all layers
        portable.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            portable.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default":
            portable.setdefault("rope_scaling", dict(rope))
    if "dtype" in portable:
        portable.setdefault("torch_dtype", portable["dtype"])
    return portable


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer's files unchanged, but for a class name that only transformers 5 knows."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())
    settings = out / "tokenizer_config.json"
    if settings.is_file():
        text = settings.read_text(encoding="utf-8")
        fixed = re.sub(r'("tokenizer_class"\s*:\s*)"TokenizersBackend"', r'\1"PreTrainedTokenizerFast"', text)
        if fixed != text:
            settings.write_text(fixed, encoding="utf-8")


def _dtype_argument() -> str:
    return "dtype" if version_tuple(installed("transformers") or "") >= (4, 56) else "torch_dtype"


@contextmanager
def _transformers() -> Iterator[Any]:
    """The transformers module without its progress bars and advice, put back afterwards."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise EnvironmentFault(
            f"transformers cannot be imported: {error}", fix='pip install "olive-next[cpu]"'
        ) from error
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
