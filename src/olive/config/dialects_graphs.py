"""Older documents' passes on ONNX graphs."""

from __future__ import annotations

from olive.config.rewrite import Context, given
from olive.config.tree import Node

MATMUL4 = "onnxmatmul4quantizer"
_ALGORITHMS = {
    "default": "OnnxBlockWiseRtnQuantization",
    "rtn": "OnnxBlockWiseRtnQuantization",
    "hqq": "OnnxHqqQuantization",
}
_INTEGERS = ("weight_type", "precision", "activation_type")


def matmul4(context: Context, entry: Node) -> str | None:
    """The pass that ``OnnxMatMul4Quantizer`` of Olive 0.6 to 0.8 stands for, by its ``algorithm``."""
    named = entry.members.pop("algorithm", None)
    asked = "default" if named is None or named.value is None else str(named.value).lower()
    kind = _ALGORITHMS.get(asked)
    if kind is None:
        context.findings.error(
            f"`algorithm`: no pass here quantises an ONNX graph by {named and named.value!r}",
            named.origin if named else entry.origin,
            "quantise the Hugging Face model with Gptq, or leave `algorithm` out",
        )
        return None
    kept = {"block_size": 32} if kind == _ALGORITHMS["rtn"] else {}
    for key, value in kept.items():
        if not given(entry, key):
            context.findings.note(f"not given, so kept as it was: {key} {value}", entry.origin)
            entry.value[key] = Node(value, entry.origin)
    return kind


def integers(context: Context, entry: Node) -> None:
    """``QInt8`` and its like are now ``int8``."""
    for key in _INTEGERS:
        node = entry.members.get(key)
        if node is not None and isinstance(node.value, str) and node.value[:2] in ("QI", "QU"):
            new = node.value[1:].lower()
            context.findings.note(f'`"{node.value}"` is now `"{new}"`', node.origin)
            node.value = new
