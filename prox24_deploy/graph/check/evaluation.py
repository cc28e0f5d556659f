"""Compute constants that are not a mere view of a stored tensor, with ONNX's reference evaluator.

A weight may be a stored tensor times a mask, a sum of two, clipped, padded, or dequantised with a
zero point for each channel. What a node multiplies by is then known only by computing it. Only
operators that take about as long as their inputs and outputs are large are computed, each constant
by itself when it is read, and within the bounds below: a file of some kB can ask for any amount.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs, helper, numpy_helper, shape_inference

from prox24_deploy.core.errors import UsageError
from prox24_deploy.graph.check.attributes import described
from prox24_deploy.graph.check.constants import constant_of, read_tensor, release
from prox24_deploy.graph.check.operators import COMPUTED, PRODUCTS, SHAPED_BY_DATA, SLOW
from prox24_deploy.graph.check.quantisers import standard_form
from prox24_deploy.sparsity.groups import Array

# A constant may be this large whatever it is made from (64 MiB in float32) ...
_FREE_ELEMENTS = 1 << 24
# ... and beyond that this many times as large as all that it is made from.
_MOST_GROWTH = 2
# Multiply-adds in a product of constants: some seconds of one core.
_MOST_PRODUCT = 1 << 36
_MOST_SLOW_ELEMENTS = 1 << 16
# Each operator costs the evaluator up to a millisecond: three seconds.
_MOST_STEPS = 3_000
# Stacks of experts have some 10^4 pieces; each takes some 30 microseconds to place.
_MOST_PIECES = 200_000
# Bounds and shapes have no more numbers than a sound file needs.
_MOST_NUMBERS = 1024

_IR_VERSION = 10

Outline = tuple[ir.DataType, tuple[int, ...]]


TOO_MUCH = "it takes more work than the check does for a file of this size"


class NotComputedError(Exception):
    """A constant that is not computed; the message says why, as a clause."""


@dataclass(slots=True)
class Budget:
    """Elements that may be read or computed for one file, so that none keeps the check busy.

    `steps` counts operators that may be computed, and `pieces` parts of constants under products.
    """

    elements: int
    steps: int = _MOST_STEPS
    pieces: int = _MOST_PIECES

    @classmethod
    def of(cls, stored: int) -> "Budget":
        """Enough to read and compute every one of the stored elements several times."""
        return cls(16 * stored + (1 << 28))

    def spend(self, elements: int, steps: int = 0, pieces: int = 0) -> None:
        """Take away from what is left.

        Raises:
            NotComputedError: nothing is left.
        """
        self.elements -= elements
        self.steps -= steps
        self.pieces -= pieces
        spent = (elements and self.elements, steps and self.steps, pieces and self.pieces)
        if min(spent) < 0:
            raise NotComputedError(TOO_MUCH)


@dataclass(slots=True)
class Evaluator:
    """Computes the constants of one model.

    `opset` is the version of ONNX's operators, `path` the model's file, None if it is in memory.
    """

    opset: int
    path: Path | None
    budget: Budget
    _small: dict[ir.Value, Array] = field(default_factory=dict, init=False)
    _latest: tuple[ir.Value, Array] | None = field(default=None, init=False)

    def outline(self, node: ir.Node, output: int, inputs: Mapping[int, Outline]) -> Outline | None:
        """Type and shape of a result, before it is computed; None if it will not be.

        Args:
            node: an operator all of whose inputs are constant.
            output: which of its results.
            inputs: type and shape of each input, by its place.
        """
        try:
            found = self._infer(node, inputs)[f"o{output}"].tensor_type
            dtype = ir.DataType(found.elem_type)
        except UsageError:
            raise
        except Exception:  # a node that breaks the standard makes ONNX raise types of many kinds
            return None
        if dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            return None
        known = found.HasField("shape") and all(d.HasField("dim_value") for d in found.shape.dim)
        shape = tuple(dim.dim_value for dim in found.shape.dim)
        sizes = {place: shape for place, (_, shape) in inputs.items()}
        return (dtype, shape) if known and _is_bounded(node, shape, sizes) else None

    def tensor(self, value: ir.Value, outline: Outline) -> ir.LazyTensor:
        """A constant that is computed each time that it is read."""
        dtype, shape = outline
        return ir.LazyTensor(
            lambda: ir.Tensor(self._shaped(value, shape)), dtype, ir.Shape(shape), name=value.name
        )

    def differing(
        self, value: ir.Value, zeros: ir.Value, axis: int, shape: tuple[int, ...]
    ) -> ir.LazyTensor:
        """Where a quantised constant differs from its zero points, of which `axis` has several."""
        return ir.LazyTensor(
            lambda: ir.Tensor(self._differing(value, zeros, axis)),
            ir.DataType.BOOL,
            ir.Shape(shape),
            name=value.name,
        )

    def array(self, value: ir.Value) -> Array:
        """A constant as an array; the last one is kept, for the parts of one weight.

        Raises:
            NotComputedError: an operator is not computed, or refuses its inputs, or too much was
                computed already.
            UsageError: stored data that it needs cannot be read.
        """
        if self._latest is None or self._latest[0] is not value:
            self._latest = None
            self._latest = (value, self._compute(value))
        return self._latest[1]

    def _shaped(self, value: ir.Value, shape: tuple[int, ...]) -> Array:
        """A constant that has the shape that its node promised."""
        array = self.array(value)
        if array.shape != shape:
            raise NotComputedError(f"it has another shape than {shape}")
        return array

    def _differing(self, value: ir.Value, zeros: ir.Value, axis: int) -> Array:
        points = self._compute(zeros)
        array = self.array(value)
        if points.ndim <= 1:
            points = points.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        try:
            return np.not_equal(array, points)
        except ValueError as error:
            raise NotComputedError("its zero points do not fit its shape") from error

    def _compute(self, value: ir.Value) -> Array:
        """Compute a value from stored tensors on, and forget what no later step needs."""
        order = self._order(value)
        uses = Counter(used for each in order for used in _inputs(each))
        known: dict[ir.Value, Array] = {}
        for each in order:
            if each not in known:
                known.update(self._results(each, known))
            for used in _inputs(each):
                uses[used] -= 1
                if not uses[used] and used is not value:
                    self._forget(used, known)
        return known[value]

    def _results(self, value: ir.Value, known: Mapping[ir.Value, Array]) -> dict[ir.Value, Array]:
        """The array of a value, and with it those of the other results of its node."""
        if value in self._small:
            return {value: self._small[value]}
        tensor = constant_of(value)
        if tensor is None:
            made = self._run(value.producer(), known)
        else:
            self.budget.spend(tensor.size)
            made = {value: read_tensor(tensor, value.name or "", self.path)}
        self._small.update((v, a) for v, a in made.items() if a.size <= _MOST_NUMBERS)
        return made

    def _forget(self, value: ir.Value, known: dict[ir.Value, Array]) -> None:
        known.pop(value, None)
        tensor = constant_of(value)
        if tensor is not None and value not in self._small:
            release(tensor)

    def _order(self, value: ir.Value) -> list[ir.Value]:
        """The constants that a value is computed from, and it, each after those that it needs."""
        order: dict[ir.Value, None] = {}
        pending = {value: iter(self._needed(value))}
        while pending:
            last = next(reversed(pending))
            step = next((v for v in pending[last] if v not in order), None)
            if step is None:
                order[last] = None
                del pending[last]
            elif step in pending:
                raise NotComputedError("it is computed from itself")
            else:
                pending[step] = iter(self._needed(step))
        return list(order)

    def _needed(self, value: ir.Value) -> list[ir.Value]:
        return [] if value in self._small else _inputs(value)

    def _run(self, node: ir.Node | None, known: Mapping[ir.Value, Array]) -> dict[ir.Value, Array]:
        """Compute one node whose inputs are known."""
        if node is None:
            raise NotComputedError("no node computes it")
        feeds = {f"i{i}": known[v] for i, v in enumerate(node.inputs) if v is not None}
        self.budget.spend(sum(array.size for array in feeds.values()), steps=1)
        from onnx.reference import ReferenceEvaluator  # a quarter of a second that few files need

        try:
            model = _model_of(*self._slotted(node))
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(model).run(None, feeds)
        except NotComputedError:
            raise
        except Exception as error:  # operators raise types of many kinds
            raise NotComputedError(f"{described(node)} cannot be computed ({error})") from error
        arrays = [np.asarray(result) for result in results]
        self.budget.spend(sum(array.size for array in arrays))
        return dict(zip((v for v in node.outputs if v.name), arrays, strict=True))

    def _infer(self, node: ir.Node, inputs: Mapping[int, Outline]) -> dict[str, onnx.TypeProto]:
        """Types of the results of a node, by the names that `_slotted` gives them."""
        types = {
            f"i{place}": helper.make_tensor_type_proto(dtype.value, shape)
            for place, (dtype, shape) in inputs.items()
        }
        data = {}
        for place, value in enumerate(node.inputs if node.op_type in SHAPED_BY_DATA else ()):
            if value is not None and math.prod(inputs[place][1]) <= _MOST_NUMBERS:
                data[f"i{place}"] = numpy_helper.from_array(self._compute(value))
        made, opset = self._slotted(node)
        return shape_inference.infer_node_outputs(
            defs.get_schema(made.op_type, opset, ""),
            made,
            types,
            data,
            opset_imports=[helper.make_opsetid("", opset)],
        )

    def _slotted(self, node: ir.Node) -> tuple[onnx.NodeProto, int]:
        """A node of ONNX with inputs i0, i1, ... and outputs o0, o1, ..., and its operator set."""
        form = standard_form(node, self.opset)
        if form is None or form[0].op_type not in COMPUTED:
            raise NotComputedError(f"{node.op_type} before it is not computed by the check")
        made, opset = form
        del made.input[:], made.output[:], made.metadata_props[:]
        made.input.extend("" if v is None else f"i{i}" for i, v in enumerate(node.inputs))
        made.output.extend(f"o{i}" if v.name else "" for i, v in enumerate(node.outputs))
        return made, opset


def _inputs(value: ir.Value) -> list[ir.Value]:
    """What a computed value is computed from; nothing for a stored one."""
    node = value.producer()
    if node is None or constant_of(value) is not None:
        return []
    return [used for used in node.inputs if used is not None]


def _is_bounded(
    node: ir.Node, shape: tuple[int, ...], inputs: Mapping[int, tuple[int, ...]]
) -> bool:
    made = math.prod(shape)
    given = sum(math.prod(sizes) for sizes in inputs.values())
    if node.op_type == "Reshape" and made != math.prod(inputs[0]):
        return False
    if node.op_type in SLOW:
        return max(made, given) <= _MOST_SLOW_ELEMENTS
    if node.op_type in PRODUCTS:
        summed = max(max(inputs.get(0, ()), default=1), 1)
        return made * summed <= _MOST_PRODUCT and made <= max(_FREE_ELEMENTS, given)
    return made <= max(_FREE_ELEMENTS, _MOST_GROWTH * given)


def _model_of(node: onnx.NodeProto, opset: int) -> onnx.ModelProto:
    inputs, outputs = (
        [helper.make_value_info(name, onnx.TypeProto()) for name in names if name]
        for names in (node.input, node.output)
    )
    graph = helper.make_graph([node], "constant", inputs, outputs)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION
    )
