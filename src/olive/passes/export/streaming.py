"""The builder's graph with weights of ours: mapped, rounded and written one after the other.

What is replaced while an export runs: how the builder loads a model, how it keeps a constant, how it packs
projections into one, how it quantises, and where large constants begin in their file. What ours do not take
over goes the builder's own way, and ``Streamed.facts`` says so.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from olive.errors import PassFailed
from olive.models.tensors import weight_files
from olive.passes.export.pages import let_go, mapped

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_WHERE = "ModelBuilder"
_TREE, _INTEGERS = "mapped", "mapped integers"
_ALIGNED = 4096  # bytes: pages of a mapped file


class Streamed:
    """What happened in one export.

    Attributes:
        weights: who loaded the weights.
        quantiser: who rounded them; None where nothing was to be rounded.
        model: the builder's class that made the graph; None while none has.
        config: the model's transformers config; to be set once the builder has loaded it.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        files = [path for folder in folders for path in weight_files(folder)]
        self._endings = (".safetensors", *(str(path.resolve()) for path in files))
        self.weights: str | None = None
        self.quantiser: str | None = None
        self.model: type | None = None
        self.config: Any = None
        self._files: list[tuple[int, int]] | None = None

    @property
    def facts(self) -> dict[str, str | None]:
        """For the record of the run."""
        return {"weights": self.weights, "quantiser": self.quantiser}

    def release(self, tensor: torch.Tensor) -> None:
        """Let go of the mapped pages of a tensor that has been read."""
        if self._files is None:
            self._files = mapped(*self._endings)
        if self._files:
            let_go(tensor, self._files, unchanged=self.weights in (_TREE, _INTEGERS))

    def forget_files(self) -> None:
        """Look for mapped files again, at the next release."""
        self._files = None

    def ensure(self, builder: Any, *, quantised: bool) -> None:
        """Refuse an export in which nothing of ours was reached.

        Raises:
            PassFailed: the installed builder is not made as the tested one.
        """
        reached, base = self.model is not None, builder.Model
        for method, found in (
            ("load_weights", self.weights),
            ("to_nbits", self.quantiser if quantised else ""),
        ):
            if self.model is not None and getattr(self.model, method, None) is getattr(base, method, None):
                reached = reached and found is not None
        if not reached:
            raise PassFailed(
                "the installed onnxruntime-genai builder does not load and quantise as the tested one does",
                where=_WHERE,
                fix="Compare the versions with the tested set: olive doctor.",
            )


@contextmanager
def streamed(builder: Any, folder: Path, stored: Path) -> Iterator[Streamed]:
    """Give the builder our ways with weights.

    Args:
        builder: its main module. There may be two copies of the class that its models are made from, of which
            the one that this module has is used, and changed here.
        folder: the model as the builder reads it.
        stored: where its weights really are.
    """
    import onnx_ir
    import torch

    from olive.passes.export import nbits
    from olive.passes.export.weights import Columns, Rows, weight

    base = builder.Model
    done = Streamed((folder, stored))
    plain = SimpleNamespace(
        initializer=base.make_initializer,
        integers=base.make_packed_matmul_int4_class,
        load=base.load_weights,
        quantise=base.to_nbits,
    )

    def make_initializer(self: Any, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False) -> None:
        done.model = type(self)
        if raw or not isinstance(tensor, (torch.Tensor, Rows, Columns)):
            plain.initializer(self, tensor, name, to=to, raw=raw)
            return
        made = weight(tensor.detach() if isinstance(tensor, torch.Tensor) else tensor, name, to, done.release)
        value = self.make_value(name, made.dtype, made.shape)
        value.const_value = made
        self.model.graph.register_initializer(value)

    def pack_floats(self: Any, q_matmul: Any, k_matmul: Any, v_matmul: Any, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(weight=Rows([q_matmul.weight, k_matmul.weight, v_matmul.weight]))

    def pack_integers(self: Any, q_matmul: Any, k_matmul: Any, v_matmul: Any) -> Any:
        parts = (q_matmul, k_matmul, v_matmul)
        if not hasattr(q_matmul, "qweight"):
            return self.make_packed_matmul_float_class(*parts)
        kinds = {(part.bits, part.group_size, part.in_features) for part in parts}
        without = any(part.qzeros is None for part in parts)
        if len(kinds) > 1 or without or self.quant_attrs["use_qdq"]:
            return plain.integers(self, *parts)
        return SimpleNamespace(
            **{
                kind: Rows([getattr(part, kind) for part in parts])
                for kind in ("qweight", "scales", "qzeros")
            },
            g_idx=q_matmul.g_idx,
            in_features=q_matmul.in_features,
            out_features=sum(part.out_features for part in parts),
            bits=q_matmul.bits,
            group_size=q_matmul.group_size,
        )

    def load_weights(self: Any, input_path: str) -> Any:
        made, done.weights = _tree(self, folder, done.config)
        if made is None:
            made = plain.load(self, input_path)
        done.forget_files()
        return made

    def to_nbits(self: Any) -> Any:
        if (reason := nbits.unfit(self)) is not None:
            done.quantiser = f"the builder's, for {reason}"
            return plain.quantise(self)
        nbits.quantise(self, done.release, nbits.Ahead(pool))
        done.quantiser = "streamed"
        return self.model

    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        ours = {
            "make_initializer": make_initializer,
            "make_packed_matmul_float_class": pack_floats,
            "make_packed_matmul_int4_class": pack_integers,
            "load_weights": load_weights,
            "to_nbits": to_nbits,
        }
        stack.enter_context(replaced(base, **ours))
        tokenizers = SimpleNamespace(from_pretrained=_kept(sys.modules[base.__module__].AutoTokenizer))
        for module in (sys.modules[base.__module__], builder):
            stack.enter_context(replaced(module, AutoTokenizer=tokenizers))
        stack.enter_context(replaced(onnx_ir, save=partial(onnx_ir.save, alignment=_ALIGNED)))
        yield done


def _tree(model: Any, folder: Path, config: Any) -> tuple[Any, str]:
    """A tree of mapped weights, or None, and what became of it."""
    from olive.models.stream import LazyTensors
    from olive.passes.export import tree

    if model.quant_type is not None:
        return None, _INTEGERS
    tensors = LazyTensors(folder)
    if (reason := tree.unfit(tensors, config, model.num_layers)) is not None:
        return None, f"transformers', for {reason}"
    with tensors:
        return tree.build(tensors, model.num_layers), _TREE


def _kept(plain: Any) -> Callable[..., Any]:
    """A tokenizer, read once; the builder asks for it again at each step."""
    found: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        if name not in found:
            found[name] = plain.from_pretrained(name, **options)
        return found[name]

    return from_pretrained


@contextmanager
def files_replaced(parts: Callable[[str], dict[str, torch.Tensor]]) -> Iterator[None]:
    """Let the builder's loader of integers read the files it finds through ``parts``: path -> tensors."""
    loaders = importlib.import_module("loaders.base")
    reached: list[str] = []

    def load_file(path: str) -> dict[str, torch.Tensor]:
        reached.append(path)
        return parts(path)

    with replaced(loaders, load_file=load_file):
        yield
    if not reached:
        raise PassFailed(
            "the installed onnxruntime-genai builder does not load integers as the tested one does",
            where=_WHERE,
            fix="Compare the versions with the tested set: olive doctor.",
        )


@contextmanager
def replaced(owner: Any, **ours: Any) -> Iterator[None]:
    """Attributes of a class or module, for a while."""
    before = {name: getattr(owner, name) for name in ours}
    for name, value in ours.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
