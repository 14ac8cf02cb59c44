"""A float32 graph in float16: weights rounded while they are written, casts only where types meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from olive.passes.onnx import operators
from olive.passes.onnx.graphs import Graph, Stored
from olive.passes.onnx.operators import Signature
from olive.passes.onnx.rounding import reader, relative_error, rounded
from olive.passes.onnx.subgraphs import captured, rename, type_by_attribute

if TYPE_CHECKING:
    from onnx import NodeProto

_FLOAT, _HALF = 1, 10  # TensorProto.DataType
# Operators whose types do not follow from their inputs alone, and those with subgraphs.
_KEPT = frozenset({"DequantizeLinear", "QuantizeLinear", "If", "Loop", "Scan", "Constant"})
# Kernels that fail at the second token (onnxruntime 1.32).
_WRONG = frozenset({("CPUExecutionProvider", "GroupQueryAttention")})
# Inputs that kernels read as float32 whatever the schema says.
_FIXED = {"GroupNorm": (1, 2), "SkipGroupNorm": (1, 2)}
# Left in float32 unless the document names others, as onnxruntime's converter does: operators without a
# float16 type, and those where 11 bits are too few.
DEFAULT_BLOCKED = (
    "ArrayFeatureExtractor", "Binarizer", "CastMap", "CategoryMapper", "DictVectorizer", "FeatureVectorizer",
    "Imputer", "LabelEncoder", "LinearClassifier", "LinearRegressor", "Normalizer", "OneHotEncoder",
    "RandomUniformLike", "SVMClassifier", "SVMRegressor", "Scaler", "TreeEnsembleClassifier",
    "TreeEnsembleRegressor", "TreeEnsemble", "ZipMap", "NonMaxSuppression", "TopK", "RoiAlign", "Range",
    "CumSum", "Min", "Max", "Upsample",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes float16.

    Attributes:
        provider: execution provider that will run the graph.
        keep: inputs and outputs that stay float32; True: all of them.
        operators, nodes: types of operators, and names of nodes, that stay float32.
        low, high: magnitudes that smaller weights, and larger finite ones, become; 0 and infinity stay.
        force: round weights of nodes in float32 too, where rounding them loses nothing.
    """

    provider: str
    keep: bool | frozenset[str] = False
    operators: frozenset[str] = frozenset(DEFAULT_BLOCKED)
    nodes: frozenset[str] = frozenset()
    low: float = 1e-7
    high: float = 1e4
    force: bool = False

    def keeps(self, name: str) -> bool:
        """Whether an input or output stays float32."""
        return self.keep if isinstance(self.keep, bool) else name in self.keep


@dataclass(slots=True)
class Converted:
    """What was done.

    Attributes:
        nodes: that compute in float16.
        weights: rounded.
        casts: nodes added.
        clipped: weight -> values moved to ``low`` or ``high``, known once the graph is written.
        errors: weight -> squared error over its sum of squares, known once the graph is written.
    """

    nodes: int = 0
    weights: int = 0
    casts: int = 0
    clipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def convert(graph: Graph, rules: Rules) -> Converted:
    """Change ``graph``; weights are rounded when it is saved."""
    return _Conversion(graph, rules).run()


@dataclass(slots=True)
class _Use:
    """A weight as an input of a node; ``exact``: not from rounded values."""

    node: NodeProto
    place: int
    half: bool
    exact: bool


class _Conversion:
    """One graph.

    ``types``: of every value as it was, ``halves``: of the float32 ones, which are float16 now.
    """

    def __init__(self, graph: Graph, rules: Rules) -> None:
        self.graph, self.rules, self.done = graph, rules, Converted()
        self.types: dict[str, int] = {}
        self.halves: set[str] = set()
        self.uses: dict[str, list[_Use]] = {}
        self.nodes: list[NodeProto] = []
        self.first: list[NodeProto] = []  # casts of weights
        self.casts: dict[tuple[str, bool], str] = {}
        self.versions = {
            "" if one.domain == "ai.onnx" else one.domain: one.version for one in graph.model.opset_import
        }
        inner = graph.graph
        inputs = {one.name for one in inner.input}
        for one in (*inner.value_info, *inner.output, *inner.input):
            if one.type.tensor_type.elem_type:
                self.types[one.name] = one.type.tensor_type.elem_type
        self.types |= {name: one.data_type for name, one in graph.weights.items()}
        fixed = inputs | {one.name for one in inner.output}
        self.weights = {name for name in graph.weights if self._is_float(name) and name not in fixed}
        self.taken = set(self.types) | {name for node in inner.node for name in node.output}

    def run(self) -> Converted:
        inner = self.graph.graph
        for one in inner.input:
            given = self._is_float(one.name) and one.name not in self.graph.weights
            if given and not self.rules.keeps(one.name):
                one.type.tensor_type.elem_type = _HALF
                self.halves.add(one.name)
        for node in inner.node:
            self._convert(node)
        for name, uses in self.uses.items():
            self._round(name, uses)
        self._finish_outputs()
        for one in inner.value_info:
            if one.name in self.halves:
                one.type.tensor_type.elem_type = _HALF
        nodes = [_copy(node) for node in (*self.first, *self.nodes)]
        del inner.node[:]
        inner.node.extend(nodes)
        self.graph.drop_unused()
        return self.done

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) == _FLOAT

    def _convert(self, node: NodeProto) -> None:
        domain = operators.domain_of(node)
        known = operators.signature(domain, node.op_type, self.versions.get(domain, 1))
        exact = (
            known is None
            or node.op_type in self.rules.operators
            or node.name in self.rules.nodes
            or (node.op_type in _KEPT and domain == "")
            or any(_sequence(known, variable) for variable in (*known.inputs, *known.outputs))
        )
        able = set() if known is None or exact else self._able(node, known)
        chosen = {
            variable for variable in able if known and self._runs(node.op_type, domain, known, variable)
        }
        self._give_types(node, known)
        is_cast = node.op_type == "Cast" and domain == ""
        for place, name in enumerate(node.input):
            if not self._is_float(name):
                continue
            variable = known.of_input(place) if known else ""
            if place in _FIXED.get(node.op_type, ()):
                variable = ""
            if name in self.weights:
                use = _Use(node, place, variable in chosen, exact or variable not in able)
                self.uses.setdefault(name, []).append(use)
            elif not is_cast:
                node.input[place] = self._cast(name, variable in chosen, self.nodes)
        for name in set(captured(node)):
            if name in self.weights or name in self.halves:
                self._rename_captured(node, name)
        for place, name in enumerate(node.output):
            if known and self._is_float(name) and known.of_output(place) in chosen:
                self.halves.add(name)
        self.done.nodes += bool(chosen)
        self.nodes.append(node)

    def _runs(self, op_type: str, domain: str, known: Signature, variable: str) -> bool:
        """Whether the provider computes the operator in float16, and rightly."""
        if (self.rules.provider, op_type) in _WRONG:
            return False
        return operators.has_half(self.rules.provider, domain, op_type, known, variable)

    def _able(self, node: NodeProto, known: Signature) -> set[str]:
        """Type variables that are float32 here and may be float16."""
        given, unknown = set[str](), set[str]()
        for place, name in enumerate(node.input):
            if self._is_float(name):
                given.add(known.of_input(place))
            elif name and name not in self.types:
                unknown.add(known.of_input(place))
        return {one for one in given - unknown if "tensor(float16)" in known.allowed.get(one, ())}

    def _give_types(self, node: NodeProto, known: Signature | None) -> None:
        """Types of outputs that the graph does not tell."""
        for place, name in enumerate(node.output):
            if not name or name in self.types:
                continue
            found = type_by_attribute(node, place)
            if found is None and known is not None:
                variable = known.of_output(place)
                bound = (
                    self.types[given]
                    for number, given in enumerate(node.input)
                    if given in self.types and known.of_input(number) == variable
                )
                found = _FLOAT if variable == "tensor(float)" else next(bound, None)
            if found:
                self.types[name] = found

    def _cast(self, name: str, half: bool, nodes: list[NodeProto], source: bool | None = None) -> str:
        """The value in float16, or in float32."""
        from onnx.helper import make_node

        now = name in self.halves if source is None else source
        if now == half:
            return name
        if (name, half) not in self.casts:
            made = self._new_name(f"{name}_to_{'float16' if half else 'float32'}")
            nodes.append(make_node("Cast", [name], [made], made, to=_HALF if half else _FLOAT))
            self.casts[name, half] = made
            self.done.casts += 1
        return self.casts[name, half]

    def _new_name(self, wanted: str) -> str:
        while wanted in self.taken:
            wanted += "_"
        self.taken.add(wanted)
        return wanted

    def _rename_captured(self, node: NodeProto, name: str) -> None:
        """A subgraph reads a value from outside: in float32."""
        if name in self.weights:
            self.uses.setdefault(name, []).append(_Use(node, -1, half=False, exact=True))
        else:
            rename(node, name, self._cast(name, False, self.nodes))

    def _round(self, name: str, uses: list[_Use]) -> None:
        """Put a rounded weight beside, or in the place of, a float32 one."""
        exact = [use for use in uses if use.exact]
        others = [use for use in uses if not use.exact]
        if not others and not self.rules.force:
            return
        made = name
        if exact and not self.rules.force:
            made = self._new_name(f"{name}_float16")
        else:
            others = uses
            self.halves.add(name)
        self._put(name, made)
        for use in others:
            given = self._cast(made, use.half, self.first, source=True)
            if use.place < 0:
                rename(use.node, name, given)
            else:
                use.node.input[use.place] = given

    def _put(self, name: str, made: str) -> None:
        read, rules, done = reader(self.graph, name), self.rules, self.done

        def make() -> tuple[Stored, ...]:
            value = read()
            half, few, many = rounded(value, rules.low, rules.high)
            if few or many:
                done.clipped[made] = few, many
            done.errors[made] = relative_error(value, half)
            return (Stored(half, _HALF, value.shape),)

        self.graph.put((made,), make)
        self.done.weights += 1

    def _finish_outputs(self) -> None:
        """Outputs in the type that is wanted, under their own name."""
        from onnx.helper import make_node

        written = {name for node in self.nodes for name in node.output}
        for one in self.graph.graph.output:
            if not self._is_float(one.name):
                continue
            if one.name not in written:  # an input or a weight, as it is
                if one.name in self.halves:
                    one.type.tensor_type.elem_type = _HALF
                continue
            half = not self.rules.keeps(one.name)
            if (one.name in self.halves) != half:
                inner = self._new_name(f"{one.name}_{'float32' if half else 'float16'}")
                for node in (*self.nodes, *self.first):
                    for names in (node.input, node.output):
                        for place, name in enumerate(names):
                            if name == one.name:
                                names[place] = inner
                    rename(node, one.name, inner)
                cast = self._new_name(f"{one.name}_cast")
                self.nodes.append(make_node("Cast", [inner], [one.name], cast, to=_HALF if half else _FLOAT))
                self.done.casts += 1
                self.halves.symmetric_difference_update({one.name})
            if half:
                one.type.tensor_type.elem_type = _HALF


def _sequence(known: Signature, variable: str) -> bool:
    """Whether a type variable stands for no tensor."""
    return not any(one.startswith("tensor") for one in known.allowed.get(variable, (variable or "tensor",)))


def _copy(node: NodeProto) -> NodeProto:
    made = type(node)()
    made.CopyFrom(node)
    return made
