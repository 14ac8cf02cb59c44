"""Write a model as one GGUF file, for llama.cpp and what is built on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from olive.config.base import PassParams
from olive.config.workflow import Accelerator
from olive.data.plan import Preview
from olive.errors import PassFailed, Problem, Severity
from olive.hardware.machine import Machine
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.foreign.gguf import ARCHITECTURES, INSIDE, OURS, OUTSIDE
from olive.models.foreign.gguf_folder import llama3_factors
from olive.models.hf import finish_folder, open_model
from olive.models.quantised import EMBEDDING, HEAD, expand
from olive.models.stream import LazyTensors
from olive.passes.base import Cost, Pass, PassContext
from olive.passes.save.formats import Matrix
from olive.passes.save.gguf_file import Entry, tokenizer, write
from olive.passes.save.save_quantized import matrices

if TYPE_CHECKING:
    import torch

_WHERE = "SaveGguf"
_FILE = "model.gguf"
_NUMBERS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_FAMILIES = {"mistral": "llama"} | {name: name for name in ARCHITECTURES}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_FIX = "Save it as gptq, awq or compressed-tensors, or convert it with llama.cpp's own tool."


class SaveGguf(Pass["SaveGguf.Params"]):
    """One file with weights, config and tokenizer; integers stay the integers they are.

    4 bits become Q4_0 (symmetric) or Q4_1, 8 bits symmetric Q8_0, blocks of more than 32 weights several
    blocks with the same scale. Scales are rounded to float16. What has no such form is stored in floating
    point.
    """

    class Params(PassParams):
        """Dtype of what stays in floating point."""

        float_dtype: Literal["float16", "bfloat16", "float32"] = Field(
            "float16", description="Dtype of matrices in floating point; vectors are float32."
        )

    accepts, produces = (Kind.HF,), Kind.GGUF
    libraries = ("torch", "safetensors")
    gates = ("integers", "parity")
    reads_integers = True

    def check(
        self, model: ModelInfo, params: Params, machine: Machine, accelerator: Accelerator
    ) -> Iterable[Problem]:
        """Architecture, scaling of positions, and integers of the input model without a form in GGUF."""
        yield from _check_config(model.config)
        left = [one.name for one in matrices(model.tensors, model.config).values() if _kind(one) is None]
        if left:
            yield Problem(
                f"{left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''} has no form in GGUF as "
                f"integers and is stored in {params.float_dtype}",
                severity=Severity.NOTE,
            )

    def check_integers(self, params: Params) -> Iterable[Problem]:
        """Integers are welcome."""
        return ()

    def check_settings(self, params: Params, quantiser: PassParams) -> Iterable[Problem]:
        """Integers of the pass before that become floating point."""
        bits, group = getattr(quantiser, "bits", 4), getattr(quantiser, "group_size", 32)
        points = "" if getattr(quantiser, "sym", False) else " with zero points"
        if (bits == 8 and points) or (group != -1 and group % 32):
            yield Problem(
                f"{bits} bits in blocks of {group}{points} have no form in GGUF: these layers would be "
                f"stored in {params.float_dtype}",
                fix="Use 4 bits, or 8 bits with sym: true, in blocks of 32 or a multiple.",
            )

    def estimate(
        self, model: ModelInfo, params: Params, machine: Machine, data: Mapping[str, Preview]
    ) -> Cost:
        """One tensor in memory; the parity gate runs the whole model in float32."""
        largest = max((prod(shape) for _, shape in model.tensors.values()), default=0)
        return Cost(
            memory=(500 << 20) + 4 * model.parameters + 8 * largest,
            disk=model.parameters * 2,
            seconds=1.0 + model.parameters * 2e-8,
        )

    def run(self, model: Artifact, params: Params, ctx: PassContext) -> None:
        """Write the file, and config and tokenizer beside it, one tensor in memory at a time.

        Raises:
            PassFailed: an architecture, a tensor or a tokenizer that has no place in GGUF here.
        """
        tensors, config = open_model(model.path)
        if problems := list(_check_config(config)):
            raise PassFailed(problems=problems)
        ctx.progress.start("save as GGUF", len(tensors))
        with tensors:
            entries = _Entries(tensors, config, _NUMBERS[params.float_dtype])
            made = entries.all()
            metadata = _metadata(config, made) | tokenizer(model.path, made["token_embd.weight"].shape[0])
            size = write(ctx.out / _FILE, metadata, made)
        ctx.progress.finish()
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        (ctx.out / "config.json").write_text(json.dumps(plain), encoding="utf-8")
        finish_folder(ctx.out, model.path)
        kinds = [one.kind for one in made.values()]
        ctx.attributes["precision"] = "int4" if {"Q4_0", "Q4_1"} & set(kinds) else "int8"
        ctx.facts |= {
            "method": _WHERE,
            "bytes": size,
            "types": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "expanded": entries.expanded,
        }
        if entries.expanded:
            ctx.progress.note(
                f"{len(entries.expanded)} layers of integers have no form in GGUF and are stored in "
                f"{params.float_dtype}: {', '.join(entries.expanded[:3])}"
            )


def _check_config(config: Mapping[str, Any]) -> Iterator[Problem]:
    kind = str(config.get("model_type"))
    if kind not in _FAMILIES:
        yield Problem(
            f"a model of type {kind} has no form in GGUF here", where=_WHERE, fix=f"{_FIX} Known: {_known()}."
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        yield Problem(f"positions scaled by {kind} have no form in GGUF here", where=_WHERE, fix=_FIX)


def _known() -> str:
    return ", ".join(_FAMILIES)


def _kind(one: Matrix) -> str | None:
    """The type of GGUF that holds these integers; None where none does."""
    width = one.columns // one.blocks
    if width % 32:
        return None
    if one.layer.bits == 8:
        return "Q8_0" if one.layer.symmetric else None
    return "Q4_0" if one.layer.symmetric else "Q4_1"


class _Entries:
    """The tensors of the file.

    Attributes:
        expanded: layers of integers that become floating point.
    """

    def __init__(self, tensors: LazyTensors, config: Mapping[str, Any], number: str) -> None:
        self.tensors, self.config, self.number = tensors, config, number
        self.found = matrices(tensors.layout, config, "F16")
        self.expanded = [name for name, one in self.found.items() if _kind(one) is None]
        self.family = _FAMILIES[str(config["model_type"])]
        self.tied = HEAD in self.found and f"{EMBEDDING}.weight" not in tensors
        heads = int(config["num_attention_heads"])
        self.heads = {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}

    def all(self) -> dict[str, Entry]:
        """Name in the file -> tensor."""
        made: dict[str, Entry] = {}
        for name in self.tensors:
            layer, _, last = name.rpartition(".")
            if layer in self.found:
                if last == "qweight":
                    place = EMBEDDING if self.tied and layer == HEAD else layer
                    made[self._name(f"{place}.weight")] = self._integers(self.found[layer])
            elif not name.endswith("rotary_emb.inv_freq"):
                made[self._name(name)] = self._number(name)
        if (factors := llama3_factors(self.config)) is not None:
            made["rope_freqs.weight"] = Entry("F32", (len(factors),), lambda: _raw(_tensor(factors)))
        return made

    def _name(self, name: str) -> str:
        base, _, kind = name.rpartition(".")
        for theirs, ours in OUTSIDE.items():
            if base == ours:
                return f"{theirs}.{kind}"
        parts = base.split(".", 3)
        if len(parts) == 4 and parts[:2] == ["model", "layers"]:
            inside = "mlp.up_proj" if parts[3] == "mlp.gate_up_proj" else parts[3]
            for theirs, ours in INSIDE.items():
                if inside == ours:
                    return f"blk.{parts[2]}.{theirs}.{kind}"
        raise PassFailed(f"{name} has no place in GGUF here", where=_WHERE, fix=_FIX)

    def _order(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Rows in the order of llama.cpp, which turns neighbouring rows of q and k of Llama."""
        heads = self.heads.get(name.rpartition(".")[2]) if self.family == "llama" else None

        def ordered(value: torch.Tensor) -> torch.Tensor:
            if heads is None:
                return value
            halves = value.view(heads, 2, -1, *value.shape[1:])
            return halves.transpose(1, 2).reshape(value.shape)

        return ordered

    def _number(self, name: str) -> Entry:
        shape = self.tensors.shape(name)
        kind = "F32" if len(shape) < 2 else self.number
        order = self._order(name.rpartition(".")[0])
        return Entry(kind, shape, lambda: _raw(order(_cast(self.tensors[name], kind, name))))

    def _integers(self, one: Matrix) -> Entry:
        order, shape, kind = self._order(one.name), (one.rows, one.columns), _kind(one)
        load = self.tensors.__getitem__

        def expanded() -> torch.Tensor:
            zeros = None if one.layer.symmetric else load(f"{one.name}.qzeros")
            packed, scales = load(f"{one.name}.qweight"), load(f"{one.name}.scales")
            value = expand(one.layer, packed, scales, zeros, one.columns)
            return _raw(order(_cast(value, self.number, one.name)))

        if kind is None:
            return Entry(self.number, shape, expanded)
        return Entry(kind, shape, lambda: _blocks(one, kind, order, load))


def _blocks(
    one: Matrix,
    kind: str,
    order: Callable[[torch.Tensor], torch.Tensor],
    load: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    """Blocks of 32 weights, uint8 (rows, bytes)."""
    from olive.quantization import ggml
    from olive.quantization.packing import pack, unpack

    repeat = one.columns // one.blocks // 32
    packed = order(load(f"{one.name}.qweight"))
    scales = order(load(f"{one.name}.scales")).float().repeat_interleave(repeat, 1)
    bits = one.layer.bits
    if bits == 8:
        return ggml.to_q8_0(packed, scales)
    if bits == 2:  # the same steps on a grid of 4 bits
        codes = unpack(packed, 2, one.columns)
        packed = pack(codes + 6 if one.layer.symmetric else codes, 4)
    if kind == "Q4_0":
        return ggml.to_q4_0(packed, scales)
    zeros = order(one.zeros(load)).float().repeat_interleave(repeat, 1)
    return ggml.to_q4_1(packed, scales, -zeros * scales.half().float())


def _metadata(config: Mapping[str, Any], made: Mapping[str, Entry]) -> dict[str, Any]:
    """What llama.cpp needs to know of the model."""
    kind = _FAMILIES[str(config["model_type"])]
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    theta = config.get("rope_theta", rope.get("rope_theta", 10000.0))
    partial = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) or 1.0
    matrix = [one.kind for one in made.values() if len(one.shape) == 2]
    found: dict[str, Any] = {
        "general.architecture": kind,
        "general.type": "model",
        "general.file_type": _FILE_TYPES[max(set(matrix), key=matrix.count)],
        "general.quantization_version": 2,
        OURS: any(kind.startswith("Q") for kind in matrix),
        f"{kind}.vocab_size": made["token_embd.weight"].shape[0],
        f"{kind}.context_length": int(config["max_position_embeddings"]),
        f"{kind}.embedding_length": int(config["hidden_size"]),
        f"{kind}.block_count": int(config["num_hidden_layers"]),
        f"{kind}.feed_forward_length": int(config["intermediate_size"]),
        f"{kind}.attention.head_count": heads,
        f"{kind}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{kind}.attention.key_length": size,
        f"{kind}.attention.value_length": size,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        f"{kind}.rope.freq_base": float(theta),
        f"{kind}.rope.dimension_count": int(size * partial),
    }
    if kind == "phi3":
        found["phi3.attention.sliding_window"] = int(config.get("sliding_window") or 0)
    return found


def _cast(value: torch.Tensor, kind: str, name: str) -> torch.Tensor:
    import torch

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    made = value.to(kinds[kind])
    if not bool(made.isfinite().all()):
        raise PassFailed(
            f"{name} has values that {kind} cannot hold, or that are NaN",
            where=_WHERE,
            fix="Set float_dtype: float32 or bfloat16; of NaN, look at what made the model.",
        )
    return made


def _tensor(values: list[float]) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32)


def _raw(value: torch.Tensor) -> torch.Tensor:
    import torch

    return value.contiguous().reshape(-1).view(torch.uint8)
