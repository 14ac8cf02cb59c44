"""What operators take and give, and which of them a provider has kernels for: asked of onnxruntime itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnx import NodeProto

_HALF = "tensor(float16)"


@dataclass(frozen=True, slots=True)
class Signature:
    """Types of an operator.

    Attributes:
        inputs, outputs: of each parameter the name of its type variable, or a type such as ``tensor(float)``.
        many: whether the last input, and the last output, may be given several times.
        allowed: type variable -> the types that it may be.
        since: version of the operators that brought it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    many: tuple[bool, bool]
    allowed: dict[str, frozenset[str]]
    since: int

    def of_input(self, place: int) -> str:
        """Type variable of an input."""
        return _at(self.inputs, place, self.many[0])

    def of_output(self, place: int) -> str:
        """Type variable of an output."""
        return _at(self.outputs, place, self.many[1])


def _at(names: tuple[str, ...], place: int, many: bool) -> str:
    if place < len(names):
        return names[place]
    return names[-1] if names and many else ""


def domain_of(node: NodeProto) -> str:
    """Domain of a node's operator; of the standard ones the empty string."""
    return "" if node.domain == "ai.onnx" else str(node.domain)


def signature(domain: str, op_type: str, version: int) -> Signature | None:
    """Types of an operator in a version of its domain; None where onnxruntime does not know it."""
    found = [one for one in _schemas().get((domain, op_type), ()) if one.since <= version]
    return max(found, key=lambda one: one.since, default=None)


def has_half(provider: str, domain: str, op_type: str, one: Signature, variable: str) -> bool:
    """Whether ``provider`` has a kernel of the operator with float16 for a type variable.

    True for a provider that the installed onnxruntime does not bring, since nothing is known of it.
    """
    if provider not in _providers():
        return True
    for first, last, constraints in _kernels().get((provider, domain, op_type), ()):
        fits = first <= one.since <= last
        if fits and (variable not in constraints or _HALF in constraints[variable]):
            return True
    return False


@cache
def _schemas() -> dict[tuple[str, str], tuple[Signature, ...]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str], list[Signature]] = {}
    for one in state.get_all_operator_schema():
        inputs, outputs = list(one.inputs), list(one.outputs)
        found.setdefault((one.domain, one.name), []).append(
            Signature(
                tuple(each.typeStr for each in inputs),
                tuple(each.typeStr for each in outputs),
                (_many(inputs), _many(outputs)),
                {each.type_param_str: frozenset(each.allowed_type_strs) for each in one.type_constraints},
                one.since_version,
            )
        )
    return {key: tuple(value) for key, value in found.items()}


def _many(parameters: list[Any]) -> bool:
    return bool(parameters) and parameters[-1].option.name == "Variadic"


@cache
def _kernels() -> dict[tuple[str, str, str], tuple[tuple[int, int, dict[str, list[str]]], ...]]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found: dict[tuple[str, str, str], list[tuple[int, int, dict[str, list[str]]]]] = {}
    for one in state.get_all_opkernel_def():
        first, last = one.version_range
        key = (one.provider, one.domain, one.op_name)
        found.setdefault(key, []).append((first, last, dict(one.type_constraints)))
    return {key: tuple(value) for key, value in found.items()}


@cache
def _providers() -> frozenset[str]:
    return frozenset(provider for provider, _, _ in _kernels())
