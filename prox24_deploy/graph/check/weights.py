"""Find the constant weights of an ONNX graph and the axis along which each is reduced."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import constant_of, input_of, is_matrix, sizes_of
from prox24_deploy.graph.check.eligibility import WeightShape
from prox24_deploy.graph.check.evaluation import Budget, NotComputedError
from prox24_deploy.graph.check.folding import Folder
from prox24_deploy.graph.check.mixing import EXPORT, FOLD
from prox24_deploy.graph.check.operands import (
    Operand,
    Reduction,
    is_known,
    reduction_of,
    sums_no_weight,
    weight_operands,
)
from prox24_deploy.graph.check.quantisers import is_dequantiser
from prox24_deploy.graph.check.sources import (
    Blocked,
    Folded,
    Part,
    Runtime,
    Source,
    Stored,
    has_matrix,
    stored_of,
)
from prox24_deploy.graph.check.strided import Strided
from prox24_deploy.sparsity.groups import GROUP

UNPACK = "check the file from which it was packed"
INLINE = "inline the functions of the model first"
# A list of numbers this long in an attribute is no bound, size or list of anchors.
_LONG_LIST = 64
_COEFFICIENTS = ("coefficients", "support_vectors")
_MACHINE_LEARNING = ("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor")


@dataclass(slots=True)
class ConstantWeight:
    """Elements of one constant tensor that nodes sum over together.

    `view` shows the elements in the order in which they are stored and `reduction` is its axis of
    the groups; `axis` is that axis of the stored tensor, -1 where it is not known. `gemm` and
    `dtype` are those of the multiplication, None where they are not known. `zero` is the stored
    number that stands for zero. `reason` says why nothing can be proven, "" if it can, and `remedy`
    what would help. `doubt` is a reason why groups that are not 2:4 prove nothing yet, and `exact`
    the weight as it is multiplied, computed, where that can settle it. A `replaceable` weight is
    the default of an input. The elements of a `moved` one have other places than in the tensor that
    `value` stores, and a computed one may be `made_of` several tensors.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    view: Strided
    reduction: int = 0
    axis: int = -1
    gemm: WeightShape | None = None
    dtype: ir.DataType | None = None
    zero: int = 0
    reason: str = ""
    remedy: str = ""
    doubt: str = ""
    exact: "ConstantWeight | None" = None
    replaceable: bool = False
    moved: bool = False
    made_of: tuple[str, ...] = ()
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every element of an initializer belongs to the weight, and is not computed."""
        return self.tensor is self.value.const_value and self.view.size == self.tensor.size

    @property
    def key(self) -> tuple[object, ...]:
        """What two weights have in common that are one."""
        place = (id(self.tensor), self.view, self.reduction, self.axis)
        return (*place, self.zero, self.reason, self.doubt)


def find_weights(
    model: ir.Model, path: Path | None = None, budget: Budget | None = None
) -> list[ConstantWeight]:
    """List every constant that a node of the model multiplies and sums over, subgraphs included.

    A weight is followed back to the tensors that are stored, also where it is chosen among several
    at run time. Elements with several consumers along one axis are listed once. A product over a
    single element, as rotary position tables use it, sums nothing and has no weight. What cannot be
    followed or read is listed with the reason.

    Args:
        model: as `graph.model_file` opens it.
        path: the file of the model, None if it holds its tensors in memory.
        budget: what may be computed, by default as much as is in proportion to the model.

    Raises:
        UsageError: external data that is needed to follow a weight is missing or damaged, or a node
            breaks the standard, or multiplies by what the file does not hold.
    """
    folder = Folder(model, path, budget)
    found: dict[tuple[object, ...], ConstantWeight] = {}
    for node in model.graph.all_nodes():
        for weight in (*_operand_weights(node, folder), *_attribute_weights(node)):
            found.setdefault(weight.key, weight).nodes.append(node)
    for function in model.functions.values():
        for node in function.all_nodes():
            for weight in _function_weights(node, function.name):
                found.setdefault(weight.key, weight).nodes.append(node)
    return list(found.values())


def _operand_weights(node: ir.Node, folder: Folder) -> Iterator[ConstantWeight]:
    operands = list(weight_operands(node))
    for operand in operands:
        _require_defined(node, node.inputs[operand.index])
    sources = [folder.fold(node.inputs[operand.index]) for operand in operands]
    if _chooses_rows(node, sources, folder):
        return
    for operand, source in zip(operands, sources, strict=True):
        others = [other for other in sources if other is not source]
        if _is_listed(operand, source, others):
            yield from _Finder(node, operand, folder).weights(source)


def _chooses_rows(node: ir.Node, sources: Sequence[Source], folder: Folder) -> bool:
    """Whether a product by a matrix of ones and zeros looks up rows, which later nodes multiply."""
    picks = any(isinstance(source, Runtime) and source.one_hot for source in sources)
    return picks and not isinstance(folder.fold(node.outputs[0]), Runtime)


def _is_listed(operand: Operand, source: Source, others: Sequence[Source]) -> bool:
    """Whether what reaches an operand is a weight rather than an activation.

    A constant always is. What is chosen or made at run time is one where weights are expected.
    Where activations are, rows of a table that are looked up, and constants that are mixed with
    other values, are activations if the other operand is a weight.
    """
    if isinstance(source, Runtime):
        return False
    first = operand.index == 0
    if source.nature == "constant" or not (first or operand.form == "data"):
        return True
    weighted = any(not isinstance(other, Runtime) for other in others)
    if operand.form in ("data", "packed") or weighted:
        return source.nature == "selected" and has_matrix(source)
    return has_matrix(source)


def _attribute_weights(node: ir.Node) -> Iterator[ConstantWeight]:
    """Weights that an operator which is not known, or of classic machine learning, holds itself."""
    if is_known(node) or sums_no_weight(node):
        return
    linear = node.op_type in _MACHINE_LEARNING
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            wanted = is_matrix(sizes_of(tensor)) and tensor.dtype != ir.DataType.STRING
        elif attribute.type == ir.AttributeType.FLOATS:
            tensor = ir.Tensor(np.asarray(attribute.as_floats(), np.float32))
            wanted = tensor.size >= _LONG_LIST or (linear and attribute.name in _COEFFICIENTS)
        else:
            continue
        if wanted:
            name = f"{attribute.name} of {node.name or node.op_type}"
            stored = Stored(value=ir.Value(name=name), tensor=tensor)
            reason = f"{node.op_type} keeps it in a form that the check does not read"
            yield _unproven(stored, reason, UNPACK)


def _function_weights(node: ir.Node, name: str) -> Iterator[ConstantWeight]:
    """Constants of a function that was not inlined, so that its attributes are not known."""
    graphs = [
        value for graph in attributes.subgraphs(node) for value in graph.initializers.values()
    ]
    for value in (*node.outputs, *graphs):
        tensor = constant_of(value)
        if tensor is not None and is_matrix(sizes_of(tensor)):
            reason = f"it lies in the local function {name}, which is too large to inline"
            yield _unproven(Stored(value=value, tensor=tensor), reason, INLINE)


def _require_defined(node: ir.Node, value: ir.Value | None) -> None:
    if value is None or value.producer() is not None or value.is_graph_input():
        return
    if constant_of(value) is None:
        raise UsageError(
            f"The {attributes.described(node)} multiplies by {value.name!r}, which the file does "
            "not hold; export it again."
        )


@dataclass(frozen=True, slots=True)
class _Finder:
    """Weights that reach one operand of one node."""

    node: ir.Node
    operand: Operand
    folder: Folder

    def weights(self, source: Source) -> Iterator[ConstantWeight]:
        """One weight for each stored part, with why it is not proven where it is not."""
        if isinstance(source, Blocked):
            if not self._is_skipped(source):
                yield from (_unproven(s, source.reason, source.remedy) for s in _named(source))
        elif isinstance(source, Folded) and source.shape and not self._is_skipped(source):
            found = reduction_of(self.node, self.operand, len(source.shape))
            if isinstance(found, str):
                yield from self._unread(source, found)
            elif found is not None and not self._sums_nothing(source, found):
                yield from self._summed(source, found)

    def _unread(self, source: Folded, reason: str) -> Iterator[ConstantWeight]:
        remedy = UNPACK if self.operand.form == "packed" else EXPORT
        if self.node.op_identifier() in self.folder.functions:
            reason = f"{self.node.op_type} is a local function that is too large to inline"
            remedy = INLINE
        yield from (_unproven(stored, reason, remedy) for stored in stored_of(source))

    def _is_skipped(self, source: Folded | Blocked) -> bool:
        """Of a node that is not known, only matrices count: scales and biases are vectors."""
        if self.operand.form != "packed" or is_known(self.node):
            return False
        return not (has_matrix(source) if isinstance(source, Blocked) else is_matrix(source.shape))

    def _sums_nothing(self, source: Folded, found: Reduction) -> bool:
        """Outer products, also of a vector that is repeated as often as is known at run time."""
        if found.axis in source.torn:
            return not has_matrix(source)
        summed = math.prod(source.shape[found.axis : found.axis + found.joined])
        return self.operand.form in ("left", "right", "einsum") and summed == 1

    def _summed(self, source: Folded, found: Reduction) -> Iterator[ConstantWeight]:
        if source.torn & set(range(found.axis, found.axis + found.joined)):
            reason = "which of its elements are summed together is chosen at run time"
            yield from (_unproven(part.stored, reason, EXPORT) for part in source.parts)
            return
        try:
            self.folder.evaluator.budget.spend(0, pieces=len(source.parts))
        except NotComputedError as error:
            yield from (_unproven(s, str(error), FOLD) for s in stored_of(source))
            return
        code = self._zero_point()
        weights = [self._weight(source, found, part, code) for part in source.parts]
        value = self.node.inputs[self.operand.index]
        if source.nature == "constant" and value is not None and weights:
            exact = self._computed(source, found, value)
            weights = [replace(w, exact=exact) if w.reason or w.doubt else w for w in weights]
        yield from weights

    def _weight(
        self, source: Folded, found: Reduction, part: Part, code: int | None
    ) -> ConstantWeight:
        """One stored part of a weight, as the node sums over it."""
        zero = None if code is None else part.zero_for(code)
        if zero is None:
            reason = "its zero points are not one known constant"
            return _unproven(part.stored, reason, EXPORT)
        placed = _placed(source, found, part)
        if isinstance(placed, str):
            return _unproven(part.stored, placed, FOLD)
        view, axis = placed
        doubt = _DOUBTS["scaled"] if part.scaled else _DOUBTS["rounded"] if part.rounded else ""
        stored, reduction = view.outer(part.choices).storage_order(axis + len(part.choices))
        return ConstantWeight(
            part.stored.value,
            part.stored.tensor,
            stored,
            reduction,
            stored.stored_axis(reduction, sizes_of(part.stored.tensor)),
            self._gemm(source, found),
            self._multiplied_in(source),
            zero,
            remedy=EXPORT if part.scaled else FOLD,
            doubt=doubt,
            replaceable=part.replaceable,
            moved=part.stored.moved,
            made_of=part.stored.made_of,
        )

    def _computed(self, source: Folded, found: Reduction, value: ir.Value) -> ConstantWeight | None:
        """The whole operand as it is multiplied, to be computed when it is read."""
        evaluator, code = self.folder.evaluator, self._zero_point()
        zeros = self._zero_points()
        if code is not None:
            tensor = evaluator.tensor(value, (source.dtype, source.shape))
        elif self.folder.is_constant(zeros) and zeros is not None:
            axis = found.outputs[0] if found.outputs else found.axis
            tensor = evaluator.differing(value, zeros, axis, source.shape)
        else:
            return None
        first = source.parts[0]
        still = len(source.parts) == 1 and first.is_in_place
        whole = Part.whole(Stored(value=first.stored.value, tensor=tensor, moved=not still))
        return self._weight(replace(source, parts=(whole,)), found, whole, code or 0)

    def _zero_point(self) -> int | None:
        """The number that stands for zero in this operand, None where elements have several."""
        zeros = self._zero_points()
        if zeros is None:
            return 0
        array = self.folder.read(zeros) if self.folder.is_constant(zeros) else None
        if array is None or not array.size or np.any(array != array.reshape(-1)[0]):
            return None
        return int(array.reshape(-1)[0])

    def _zero_points(self) -> ir.Value | None:
        place = self.operand.zero_point
        return None if place is None else input_of(self.node, place)

    def _gemm(self, source: Folded, found: Reduction) -> WeightShape:
        summed = math.prod(source.shape[found.axis : found.axis + found.joined]) // found.groups
        groups = attributes.integer(self.node, "group", 1)
        return WeightShape(
            n=math.prod(source.shape[i] for i in found.outputs), k=summed, groups=groups
        )

    def _multiplied_in(self, source: Folded) -> ir.DataType:
        """Type of the multiplication: that before dequantisation only if both operands pass one."""
        other = input_of(self.node, 0 if self.operand.index else 1)
        producer = other.producer() if other is not None else None
        both = producer is not None and is_dequantiser(producer)
        return source.quantized if source.quantized is not None and both else source.dtype


_DOUBTS = {
    "scaled": "it is multiplied by values known at run time alone, which may make more of it zero",
    "rounded": "it is rounded before it is multiplied, which may make more of it zero",
}


def _placed(source: Folded, found: Reduction, part: Part) -> tuple[Strided, int] | str:
    """A part with one axis for each sum, and that axis; or why its groups cannot be told."""
    view, axis = part.view, found.axis
    if found.joined > 1:
        behind = range(axis, axis + found.joined)
        whole = all(view.shape[i] == source.shape[i] for i in behind)
        merged = view.merge(axis, found.joined) if whole else None
        if merged is None:
            return "the axes that are summed together do not follow each other where it is stored"
        view = merged
    length = view.shape[axis] if found.joined > 1 else source.shape[axis]
    if found.groups > 1:
        length //= found.groups
        if view.shape[axis] != source.shape[axis] or length * found.groups != view.shape[axis]:
            return f"its {found.groups} groups do not fit the stored tensor"
        view = view.split(axis, found.groups)
        axis += 1
    start = part.start[found.axis] if found.groups == found.joined == 1 else 0
    outside = [edge for edge in (start, start + view.shape[axis]) if edge % GROUP]
    if outside and length % GROUP == 0:
        return f"other tensors are joined to it at position {outside[0]}, inside a group of four"
    if view.size and view.strides[axis] == 0 and length > 1:
        return "its elements are repeated along the axis that is summed"
    return view, axis


def _named(source: Source) -> list[Stored]:
    """Constants to list for a value that is not followed: its matrices, or the largest tensor."""
    stored = stored_of(source)
    return [s for s in stored if is_matrix(sizes_of(s.tensor))] or list(stored[:1])


def _unproven(stored: Stored, reason: str, remedy: str) -> ConstantWeight:
    whole = Strided.of(sizes_of(stored.tensor))
    return ConstantWeight(
        stored.value, stored.tensor, whole, reason=reason, remedy=remedy, made_of=stored.made_of
    )
