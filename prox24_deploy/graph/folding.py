"""Follow a constant value back to the stored tensors whose elements it shows.

Nodes that only renumber elements are followed exactly: Transpose, Reshape, Flatten, Squeeze,
Unsqueeze, Expand, Slice, Split, Concat, and Gather of one index. So are those that keep zeros zero:
Identity, Cast, QuantizeLinear and DequantizeLinear. Where anything else computes a constant, the
result is `Blocked` and says why.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import onnx_ir as ir

from prox24_deploy.graph.constants import (
    ONNX_DOMAINS,
    QUANTISERS,
    constant_of,
    input_of,
    read_tensor,
    release,
    sizes_of,
)
from prox24_deploy.graph.strided import Strided

# No bound or shape has more numbers, and NumPy knows no more axes, than a sound file needs.
_MOST_NUMBERS = 1024
_MOST_AXES = 32


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one stored tensor, and where in the folded tensor they begin.

    `zero_point` is the input of the DequantizeLinear that stored integers pass, if any. `is_float`
    says that a QuantizeLinear came before it, so that the stored zero is that of a float.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    view: Strided
    start: tuple[int, ...]
    zero_point: ir.Value | None = None
    is_float: bool = False


@dataclass(frozen=True, slots=True)
class Folded:
    """A constant as the stored parts that it is put together from.

    `dtype` is that of the values as they arrive, `quantized` the type before the DequantizeLinear
    that they leave, if they come straight from one.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    quantized: ir.DataType | None = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """A constant that cannot be followed: its largest stored source, and why."""

    value: ir.Value
    tensor: ir.TensorProtocol
    shape: tuple[int, ...] | None
    reason: str


class Folder:
    """Folds the constant values of one model; `path` is its file, None if it is in memory."""

    def __init__(self, constants: Collection[ir.Value], path: Path | None) -> None:
        self._constants = constants
        self._path = path
        self._sources: dict[ir.Value, tuple[ir.Value, ir.TensorProtocol]] = {}

    def fold(self, value: ir.Value | None) -> Folded | Blocked | None:
        """Stored parts of a value, or why they cannot be told; None if inputs can change it."""
        if value is None or value not in self._constants:
            return None
        tensor = constant_of(value)
        if tensor is not None:
            shape = sizes_of(tensor)
            part = Part(value, tensor, Strided.of(shape), (0,) * len(shape))
            return Folded((part,), shape, tensor.dtype)
        node = value.producer()
        return None if node is None else self._follow(node, value) or self._blocked(node, value)

    def _follow(self, node: ir.Node, value: ir.Value) -> Folded | Blocked | None:
        """Result of one node; None where its kind, or this use of it, is not followed."""
        if node.domain not in ONNX_DOMAINS and node.op_type not in QUANTISERS:
            return None
        if node.op_type == "Concat":
            return self._concat(node)
        source = self.fold(input_of(node, 0))
        if not isinstance(source, Folded):
            return source and replace(source, shape=_static_shape(value))
        match node.op_type:
            case "Identity" | "Cast" | "CastLike" | "QuantizeLinear" | "DequantizeLinear":
                return _retyped(node, source)
            case "Transpose":
                return _transposed(node, source)
            case "Slice":
                return self._sliced(node, source)
            case "Split":
                return self._split(node, source, list(node.outputs).index(value))
            case "Gather":
                return self._selected(node, source)
            case "Expand":
                shape = self._integers(input_of(node, 1))
                return None if shape is None else _renumbered(source, shape, expand=True)
            case _:
                shape = self._new_shape(node, source.shape)
                return None if shape is None else _renumbered(source, shape)

    def _blocked(self, node: ir.Node, value: ir.Value) -> Blocked:
        """Name the largest stored tensor behind a value that is not followed."""
        reason = (
            f"{node.op_type} computes the weight from it in a way that the check does not follow"
        )
        return Blocked(*self._largest(value), _static_shape(value), reason)

    def _largest(self, value: ir.Value) -> tuple[ir.Value, ir.TensorProtocol]:
        if value not in self._sources:
            tensor, node = constant_of(value), value.producer()
            inputs = node.inputs if node is not None and tensor is None else ()
            sources = [source for source in inputs if source is not None]
            found = [self._largest(source) for source in sources if source in self._constants]
            stored = found if tensor is None else [(value, tensor)]
            self._sources[value] = max(stored, key=lambda pair: pair[1].size)
        return self._sources[value]

    def _concat(self, node: ir.Node) -> Folded | Blocked | None:
        sources = [self.fold(value) for value in node.inputs]
        folded = [source for source in sources if isinstance(source, Folded)]
        if len(folded) < len(sources):
            return next((source for source in sources if isinstance(source, Blocked)), None)
        axis = _axis(node.attributes.get_int("axis", 0), len(folded[0].shape))
        if axis is None or len({_put(source.shape, axis, 0) for source in folded}) > 1:
            return None
        starts = accumulate((source.shape[axis] for source in folded), initial=0)
        parts = tuple(
            replace(part, start=_put(part.start, axis, part.start[axis] + begin))
            for source, begin in zip(folded, starts, strict=False)
            for part in source.parts
        )
        length = sum(source.shape[axis] for source in folded)
        return replace(folded[0], parts=parts, shape=_put(folded[0].shape, axis, length))

    def _sliced(self, node: ir.Node, source: Folded) -> Folded | None:
        """Slice with bounds as inputs (opset 10) or attributes; backward steps are not followed."""
        starts = self._numbers(node, 1, "starts")
        ends = self._numbers(node, 2, "ends")
        if starts is None or ends is None:
            return None
        axes = self._numbers(node, 3, "axes", tuple(range(len(starts))))
        steps = self._numbers(node, 4, "steps", (1,) * len(starts))
        if axes is None or steps is None or min(steps, default=1) < 1:
            return None
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=False):
            at = _axis(axis, len(source.shape))
            if at is None:
                return None
            bounds = slice(start, end, step).indices(source.shape[at])
            source = _cut(source, at, range(*bounds))
        return source

    def _split(self, node: ir.Node, source: Folded, output: int) -> Folded | None:
        axis = _axis(node.attributes.get_int("axis", 0), len(source.shape))
        if axis is None:
            return None
        count = max(1, node.attributes.get_int("num_outputs", len(node.outputs)))
        chunk = -(-source.shape[axis] // count)
        lengths = self._numbers(node, 1, "split", (chunk,) * count)
        if lengths is None or output >= len(lengths):
            return None
        begin = sum(lengths[:output])
        end = min(begin + lengths[output], source.shape[axis])
        return _cut(source, axis, range(begin, end))

    def _selected(self, node: ir.Node, source: Folded) -> Folded | Blocked | None:
        """Gather of one scalar index, as `weight[i]` is exported."""
        axis = _axis(node.attributes.get_int("axis", 0), len(source.shape))
        index = self.fold(input_of(node, 1))
        picked = self._integers(input_of(node, 1))
        if axis is None or picked is None or index is None or index.shape:
            return None
        at = range(source.shape[axis])[picked[0] :][:1]
        rest = (*source.shape[:axis], *source.shape[axis + 1 :])
        return _renumbered(_cut(source, axis, at), rest)

    def _new_shape(self, node: ir.Node, old: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape after Reshape, Flatten, Squeeze or Unsqueeze, None for another or unknown."""
        if node.op_type == "Reshape":
            wanted = self._numbers(node, 1, "shape")
            allow_zero = bool(node.attributes.get_int("allowzero", 0))
            return None if wanted is None else _reshaped(old, wanted, allow_zero=allow_zero)
        if node.op_type == "Flatten":
            axis = node.attributes.get_int("axis", 1)
            return math.prod(old[:axis]), math.prod(old[axis:])
        if node.op_type == "Squeeze":
            ones = tuple(axis for axis, length in enumerate(old) if length == 1)
            axes = self._numbers(node, 1, "axes", ones)
            return None if axes is None else _squeezed(old, axes)
        if node.op_type == "Unsqueeze":
            axes = self._numbers(node, 1, "axes")
            return None if axes is None else _unsqueezed(old, axes)
        return None

    def _numbers(
        self, node: ir.Node, index: int, attribute: str, default: tuple[int, ...] | None = None
    ) -> tuple[int, ...] | None:
        """Integers given as an input, or as an attribute in older operator sets."""
        value = input_of(node, index)
        if value is not None:
            return self._integers(value)
        given = node.attributes.get_ints(attribute, None)
        return default if given is None else tuple(given)

    def _integers(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Elements of a constant that says how to renumber another, as bounds and shapes do."""
        source = self.fold(value)
        if not isinstance(source, Folded) or math.prod(source.shape) > _MOST_NUMBERS:
            return None
        numbers = np.zeros(source.shape, np.int64)
        for part in source.parts:
            begins = zip(part.start, part.view.shape, strict=True)
            numbers[tuple(slice(begin, begin + length) for begin, length in begins)] = (
                part.view.apply(read_tensor(part.tensor, part.value.name or "", self._path))
            )
            release(part.tensor)
        return tuple(numbers.reshape(-1).tolist())


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    return value.shape.numpy() if value.shape is not None and value.shape.is_static() else None


def _axis(axis: int, rank: int) -> int | None:
    return axis % rank if -rank <= axis < rank else None


def _put(numbers: tuple[int, ...], axis: int, number: int) -> tuple[int, ...]:
    return (*numbers[:axis], number, *numbers[axis + 1 :])


def _retyped(node: ir.Node, source: Folded) -> Folded:
    """Same elements in the type that the node gives them."""
    if node.op_type == "Identity":
        return source
    dtype = _output_type(node, source.dtype)
    if node.op_type == "QuantizeLinear":
        parts = tuple(replace(part, is_float=True) for part in source.parts)
        return Folded(parts, source.shape, dtype)
    if node.op_type == "DequantizeLinear":
        zero = input_of(node, 2)
        parts = tuple(
            part if part.is_float else replace(part, zero_point=zero) for part in source.parts
        )
        return Folded(parts, source.shape, dtype, source.dtype)
    return replace(source, dtype=dtype, quantized=None)


def _output_type(node: ir.Node, default: ir.DataType) -> ir.DataType:
    """Type of the first output, as the graph says it or as the operator makes it."""
    told = node.outputs[0].dtype
    if told is not None:
        return told
    stated = node.attributes.get_int("to", 0) or node.attributes.get_int("output_dtype", 0)
    if stated:
        return ir.DataType(stated)
    if node.op_type == "QuantizeLinear":
        zero = _type_of(node, 2)
        return ir.DataType.UINT8 if zero is None else zero
    return _type_of(node, 1) or default


def _type_of(node: ir.Node, index: int) -> ir.DataType | None:
    value = input_of(node, index)
    tensor = constant_of(value)
    return tensor.dtype if tensor is not None else value.dtype if value is not None else None


def _transposed(node: ir.Node, source: Folded) -> Folded | None:
    rank = len(source.shape)
    perm = node.attributes.get_ints("perm", None)
    order = tuple(reversed(range(rank))) if perm is None else tuple(perm)
    if sorted(order) != list(range(rank)):
        return None
    parts = tuple(
        replace(
            part, view=part.view.transpose(order), start=tuple(part.start[axis] for axis in order)
        )
        for part in source.parts
    )
    return replace(source, parts=parts, shape=tuple(source.shape[axis] for axis in order))


def _cut(source: Folded, axis: int, kept: range) -> Folded:
    """Keep some indices of one axis; parts that hold none of them fall away."""
    parts = []
    for part in source.parts:
        begin = part.start[axis]
        # The first kept index that is not before the part.
        first = max(kept.start, begin + (kept.start - begin) % kept.step)
        inside = range(first, min(kept.stop, begin + part.view.shape[axis]), kept.step)
        if inside:
            view = part.view.slice(axis, inside.start - begin, len(inside), kept.step)
            start = _put(part.start, axis, (inside.start - kept.start) // kept.step)
            parts.append(replace(part, view=view, start=start))
    return replace(source, parts=tuple(parts), shape=_put(source.shape, axis, len(kept)))


def _renumbered(
    source: Folded, shape: Sequence[int], *, expand: bool = False
) -> Folded | Blocked | None:
    """Give the elements of one part another shape, if fixed strides still describe them."""
    if len(source.parts) != 1 or len(shape) > _MOST_AXES:
        return None
    part = source.parts[0]
    view = part.view.expand(shape) if expand else part.view.reshape(shape)
    if view is None:
        reason = "it is reshaped in a way that no fixed steps through the stored tensor describe"
        return Blocked(part.value, part.tensor, tuple(shape), reason)
    part = replace(part, view=view, start=(0,) * len(view.shape))
    return replace(source, parts=(part,), shape=view.shape)


def _reshaped(
    old: tuple[int, ...], wanted: tuple[int, ...], *, allow_zero: bool
) -> tuple[int, ...] | None:
    """Resolve 0 (keep the length) and -1 (what is left) of a Reshape."""
    if not allow_zero and any(n == 0 and i >= len(old) for i, n in enumerate(wanted)):
        return None
    shape = [old[i] if n == 0 and not allow_zero else n for i, n in enumerate(wanted)]
    if -1 in shape:
        rest = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = math.prod(old) // rest if rest else 0
    return tuple(shape)


def _squeezed(old: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    gone = {axis % len(old) for axis in axes} if old else set()
    return tuple(length for axis, length in enumerate(old) if axis not in gone)


def _unsqueezed(old: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    rank = len(old) + len(axes)
    new = {axis % rank for axis in axes}
    rest = iter(old)
    return tuple(1 if axis in new else next(rest, 1) for axis in range(rank))
