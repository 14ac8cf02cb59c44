"""GGUF, the format of llama.cpp: a model in one file, in our layout.

Q4_0 and Q8_0 lie on our grid as they are; Q6_K does with 8 bits in blocks of 16. Files that SaveGguf wrote
have minima of Q4_1 that are a whole number of steps, and say so. Where every linear layer of the decoder is
of these kinds the model is one of integers; else all of it is expanded to the floating point it stands for,
because an export takes one or the other. llama.cpp keeps rows of q and k of Llama in another order; that is
undone, on rows of integers as on rows of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from olive.errors import ConfigError, EnvironmentFault
from olive.models.foreign.gguf_header import Header, Stored, read
from olive.models.foreign.view import Load, Part, View
from olive.models.quantised import EMBEDDING, HEAD, Layer, expand
from olive.models.stream import LazyTensors

if TYPE_CHECKING:
    import torch

OURS = "olive.integers"  # metadata of files that SaveGguf wrote: minima are whole steps
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
OUTSIDE = {"token_embd": EMBEDDING, "output_norm": "model.norm", "output": HEAD}
INSIDE = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_OWN = ("Q4_0", "Q4_1", "Q8_0", "Q6_K")  # expanded here; the package gguf expands the others
_KINDS = {"Q4_0": Layer(4, 32, True), "Q8_0": Layer(8, 32, True), "Q6_K": Layer(8, 16, True)}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file: its name there and here, and the heads whose rows are in llama.cpp's order."""

    source: str
    name: str
    stored: Stored
    heads: int

    @property
    def layer(self) -> str:
        return self.name.removesuffix(".weight")

    def codes(self, load: Load) -> torch.Tensor:
        return self._rows(self._integers(load)[0])

    def scales(self, load: Load) -> torch.Tensor:
        return self._rows(self._integers(load)[1])

    def zeros(self, load: Load) -> torch.Tensor:
        from olive.quantization import ggml
        from olive.quantization.packing import pack

        _, scales, minima = ggml.q4_1(load(self.source), self.stored.shape[0])
        return self._rows(pack(ggml.zero_points(scales, minima), 4))

    def _integers(self, load: Load) -> tuple[torch.Tensor, ...]:
        from olive.quantization import ggml

        kinds: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
            "Q4_0": ggml.q4_0,
            "Q4_1": ggml.q4_1,
            "Q8_0": ggml.q8_0,
            "Q6_K": ggml.q6_k,
        }
        return kinds[self.stored.kind](load(self.source), self.stored.shape[0])

    def number(self, load: Load) -> torch.Tensor:
        """In floating point: float32, or as stored."""
        import torch

        data, shape = load(self.source), self.stored.shape
        if self.stored.kind in _PLAIN:
            kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
            return self._rows(data.view(kinds[self.stored.kind]).view(shape))
        if self.stored.kind in _OWN:
            return self._rows(self._expanded(load))
        import gguf

        kind = gguf.GGMLQuantizationType[self.stored.kind]
        expanded = gguf.dequantize(data.view(shape[0], -1).numpy(), kind)
        return self._rows(torch.from_numpy(expanded).view(shape))

    def _expanded(self, load: Load) -> torch.Tensor:
        from olive.quantization import ggml
        from olive.quantization.packing import unpack

        if self.stored.kind == "Q4_1":
            packed, scales, minima = ggml.q4_1(load(self.source), self.stored.shape[0])
            steps = unpack(packed, 4, self.stored.shape[1]).float().unflatten(1, (-1, 32))
            return (steps * scales.float()[..., None] + minima.float()[..., None]).flatten(1)
        packed, scales = self._integers(load)
        return expand(_KINDS[self.stored.kind], packed, scales, None, self.stored.shape[1])

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        """Rows in the order of Hugging Face."""
        if not self.heads:
            return value
        pairs = value.view(self.heads, -1, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)


class GgufTensors(LazyTensors):
    """Tensors of our layout, made from those of a GGUF file."""

    def __init__(self, path: Path, header: Header, view: View) -> None:
        self.folder, self._path, self._stored, self._parts = path.parent, path, header.tensors, view.parts
        self.layout = {name: part.layout for name, part in view.parts.items()}
        self.by_file = {"model.safetensors": list(self.layout)}
        self._data: torch.Tensor | None = None

    def __enter__(self) -> Self:
        import torch

        size = self._path.stat().st_size
        self._data = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        return self

    def __exit__(self, *_: object) -> None:
        self._data = None

    def __getitem__(self, name: str) -> torch.Tensor:
        part = self._parts[name]
        return part.make(self._load) if part.make else self._load(part.source)

    def _load(self, source: str) -> torch.Tensor:
        """Bytes of a tensor of the file, at an address that any dtype may have."""
        stored = self._stored[source]
        if self._data is None:
            raise ConfigError(f"{self._path} is not open")
        return self._data[stored.begin : stored.end].clone()


def file_in(folder: Path) -> Path | None:
    """The GGUF file of a folder without safetensors; None where there is none.

    Raises:
        ConfigError: there are several.
    """
    if next(folder.glob("*.safetensors"), None) is not None:
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise ConfigError(
            f"{folder} holds {len(files)} GGUF files: {', '.join(path.name for path in files[:3])}",
            where="input_model",
            fix="Name one of them as model_path; parts of one model are merged by llama-gguf-split --merge.",
        )
    return files[0] if files else None


def open_file(path: Path) -> tuple[Header, View]:
    """Header and translation of a file.

    Raises:
        ConfigError: an architecture, a tensor or a type that is not read here.
        UntrustedInput: the file is damaged.
    """
    header = read(path)
    return header, view(header)


def view(header: Header) -> View:
    """A file in our layout, by its header."""
    tensors = list(_tensors(header))
    exact = bool(header.metadata.get(OURS))
    tied = "output.weight" not in header.tensors
    linear = [one for one in tensors if len(one.stored.shape) == 2 and one.name != f"{EMBEDDING}.weight"]
    whole = exact or (bool(linear) and all(_layer(one, exact) for one in linear if one.layer != HEAD))
    others = sorted({one.stored.kind for one in tensors} - {*_PLAIN, *_OWN})
    if others and find_spec("gguf") is None:
        raise EnvironmentFault(
            f"the file holds {', '.join(others)}, which the package gguf expands; it is not installed",
            fix='pip install "olive-next[gguf]"',
        )
    found = View()
    for one in tensors:
        layer = _layer(one, exact) if whole and len(one.stored.shape) == 2 else None
        if one.name == f"{EMBEDDING}.weight":
            layer = layer if tied else None
        if layer is not None:
            _add_integers(found, one, HEAD if one.name == f"{EMBEDDING}.weight" else one.layer, layer)
        else:
            code = _PLAIN.get(one.stored.kind, "F32")
            found.parts[one.name] = Part((code, one.stored.shape), one.source, one.number)
    expanded = sorted(
        {one.stored.kind for one in tensors if one.name in found.parts and one.stored.kind not in _PLAIN}
    )
    if expanded:
        found.notes.append(
            f"the file holds {', '.join(expanded)}, expanded to the floating-point weights they stand for"
            + ("" if whole else ": minima or scales of some layers lie on no grid with integer zero points")
        )
    return found


def _layer(one: _Tensor, exact: bool) -> Layer | None:
    if one.stored.kind == "Q4_1" and exact:
        return Layer(4, 32, False)
    return _KINDS.get(one.stored.kind)


def _add_integers(found: View, one: _Tensor, name: str, layer: Layer) -> None:
    rows, columns = one.stored.shape
    blocks = columns // layer.group_size
    found.layers[name] = layer
    found.parts[f"{name}.qweight"] = Part(("U8", (rows, columns * layer.bits // 8)), one.source, one.codes)
    code = "F32" if one.stored.kind == "Q6_K" else "F16"
    found.parts[f"{name}.scales"] = Part((code, (rows, blocks)), one.source, one.scales)
    if not layer.symmetric:
        found.parts[f"{name}.qzeros"] = Part(("U8", (rows, -(-blocks // 2))), one.source, one.zeros)


def _tensors(header: Header) -> list[_Tensor]:
    architecture = str(header.metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"the file holds a model of architecture {architecture!r}, which is not read here",
            where="input_model",
            fix=f"Use {', '.join(ARCHITECTURES)}, or the model as Hugging Face has it.",
        )
    if int(header.metadata.get("split.count", 0)) > 1:
        raise ConfigError(
            "the file is one part of several", where="input_model", fix="llama-gguf-split --merge joins them."
        )
    found = []
    for source, stored in header.tensors.items():
        if source.startswith(("rope_freqs", "rope_factors")):
            continue  # told by the config
        heads = 0
        if architecture == "llama" and ".attn_q." in source:
            heads = number(header.metadata, "llama.attention.head_count")
        elif architecture == "llama" and ".attn_k." in source:
            heads = number(header.metadata, "llama.attention.head_count_kv", "llama.attention.head_count")
        if heads and stored.shape[0] % (2 * heads):
            raise ConfigError(f"{source} has {stored.shape[0]} rows for {heads} heads", where="input_model")
        found.append(_Tensor(source, _name(source, architecture), stored, heads))
    return found


def _name(source: str, architecture: str) -> str:
    """The name Hugging Face has for a tensor."""
    if match := _BLOCK.fullmatch(source):
        number, part, kind = match.groups()
        if part in INSIDE:
            fused = architecture == "phi3" and part == "ffn_up"
            return f"model.layers.{number}.{'mlp.gate_up_proj' if fused else INSIDE[part]}.{kind}"
    else:
        base, _, kind = source.rpartition(".")
        if base in OUTSIDE:
            return f"{OUTSIDE[base]}.{kind}"
    raise ConfigError(
        f"the file holds {source}, which has no place in a model of {architecture} here",
        where="input_model",
        fix="Use the model as Hugging Face has it.",
    )


def number(metadata: Mapping[str, Any], *keys: str) -> int:
    """A whole number of the metadata, under the first of the keys that is there.

    Raises:
        ConfigError: none is there, or it is none.
    """
    for key in keys:
        value = metadata.get(key)
        if isinstance(value, int):
            return value
    raise ConfigError(f"the file has no {keys[0]}", where="input_model", fix="Convert the model again.")
