"""Nodes that change the elements of a constant but keep its zeros zero.

Each function takes a `Step` with what is known of its inputs and gives the source of its result, or
None where zeros may not stay zero, or where the constant is rather computed exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.constants import type_of_input
from prox24_deploy.graph.check.movement import Rule
from prox24_deploy.graph.check.operators import ZERO_KEEPING
from prox24_deploy.graph.check.quantisers import quantised_type
from prox24_deploy.graph.check.sources import (
    Blocked,
    Folded,
    Part,
    Runtime,
    Source,
    broadcast,
    either,
    has_matrix,
    scaled_by_runtime,
    widest,
)
from prox24_deploy.graph.check.step import Step

# Of these operators only zero gives zero.
_ONE_TO_ONE = ("Abs", "Neg", "Sign")
# This type has no zero, so that nothing stays zero in it.
_WITHOUT_ZERO = ir.DataType.FLOAT8E8M0


def cast(step: Step, source: Folded) -> Source | None:
    """Cast and CastLike: the numbers stay, but for those too small or too large for the type."""
    dtype = attributes.element_type(step.node, "to") or type_of_input(step.node, 1) or source.dtype
    if dtype == _WITHOUT_ZERO:
        return None
    rounded = not _holds(dtype, source.dtype)
    parts = tuple(replace(part, rounded=part.rounded or rounded) for part in source.parts)
    return replace(source, parts=parts, dtype=dtype, quantized=None)


def quantize(step: Step, source: Folded) -> Source | None:
    """QuantizeLinear: zero becomes the zero point, and small numbers do too."""
    point = _zero_point(step)
    dtype = quantised_type(step.node)
    if point is None or dtype == _WITHOUT_ZERO:
        return None
    parts = [_recoded(part, 0, point, rounded=True) for part in source.parts]
    return _with_parts(source, parts, dtype)


def dequantize(step: Step, source: Folded) -> Source | None:
    """DequantizeLinear: the zero point becomes zero, whatever the scale is."""
    point = _zero_point(step)
    if point is None or not _is_finite(step):
        return None
    parts = [_recoded(part, point, 0) for part in source.parts]
    dtype = attributes.element_type(step.node, "output_dtype") or type_of_input(step.node, 1)
    found = _with_parts(source, parts, dtype or ir.DataType.FLOAT)
    return found and replace(found, quantized=source.dtype)


def clip(step: Step, source: Folded) -> Source | None:
    """Clip to bounds with zero between them."""
    if source.nature == "constant" and all(part.zero is None for part in source.parts):
        return None
    low, high = _bound(step, 1, "min"), _bound(step, 2, "max")
    codes = {part.code for part in source.parts}
    if low is None or high is None or not all(low <= code <= high for code in codes):
        return None
    parts = [_recoded(part, part.code, part.code, rounded=True) for part in source.parts]
    return _with_parts(source, parts, source.dtype)


def keeping_zeros(step: Step, source: Folded) -> Source | None:
    """An operator of one tensor that maps zero to zero; of a constant it is computed."""
    if source.nature == "constant":
        return None
    return _zeros_kept(source, rounded=step.op not in _ONE_TO_ONE)


def multiply(step: Step, source: Folded) -> Source | None:
    """Mul by what is known at run time alone, or of a chosen constant by a scale."""
    if not step.has(0) or not step.has(1):
        return None
    first, second = step.source(0), step.source(1)
    other = second if source is first else first
    if isinstance(other, Runtime):
        return _modulated(step, source, 0 if other is first else 1)
    if source.nature == "constant" and other.nature == "constant":
        return None
    if isinstance(other, Blocked) or has_matrix(other):
        return None
    met = _met(step, source, [0 if other is first else 1])
    found = met and scaled_by_runtime(met)
    return found and replace(found, nature=widest((source.nature, other.nature)))


def divide(step: Step, source: Folded) -> Source | None:
    """Div of a constant by what is known at run time alone; such a divisor is taken as finite."""
    if source is not step.source(0) or not step.has(1):
        return None
    if not isinstance(step.source(1), Runtime):
        return None
    return _modulated(step, source, 1)


def add(step: Step, source: Folded) -> Source | None:
    """Add of zeros, or Sub of them."""
    other = 1 if source is step.source(0) else 0
    moves = step.op == "Sub" and other == 0
    if source.nature == "constant" or moves or not _is_zero(step, other):
        return None
    met = _met(step, source, [other])
    return met and _zeros_kept(met)


def limit(step: Step, source: Folded) -> Source | None:
    """Min or Max with constants that leave zero as it is."""
    if source.nature == "constant":
        return None
    others = [i for i in range(len(step.sources)) if step.source(i) is not source]
    for index in others:
        bound = step.array(index)
        if bound is None or np.any(bound < 0 if step.op == "Min" else bound > 0):
            return None
    met = _met(step, source, others)
    return met and _zeros_kept(met)


def where(step: Step, _: Folded) -> Source | None:
    """Where between constants of which, or by which, something is known at run time alone.

    With zeros on the other side it is a mask. Otherwise the choice may differ from element to
    element, and along every axis.
    """
    if all(step.is_constant(index) for index in range(3)):
        return None
    for index in (1, 2):
        found = step.source(index)
        if isinstance(found, Folded) and _is_zero(step, 3 - index):
            met = _met(step, found, [0, 3 - index])
            scaled = met and scaled_by_runtime(met)
            return scaled and replace(scaled, nature=widest(("selected", found.nature)))
    first, second = step.source(1), step.source(2)
    if not isinstance(first, Folded) or not isinstance(second, Folded) or _is_full(step):
        return None
    either_way = [_met(step, first, [0, 2]), _met(step, second, [0, 1])]
    known = [found for found in either_way if found is not None]
    return either(known) if len(known) == len(either_way) else None


def _modulated(step: Step, source: Folded, other: int) -> Source | None:
    """A constant times a value known at run time alone, which may be an activation."""
    found = step.source(other)
    if isinstance(found, Runtime) and found.hot and step.covers(other, source.shape):
        return Runtime(hot=True)
    if not has_matrix(source):
        return Runtime(hot=isinstance(found, Runtime) and found.hot)
    met = _met(step, source, [other])
    return met and scaled_by_runtime(met)


def _met(step: Step, source: Folded, others: Sequence[int]) -> Folded | None:
    """A value as it is spread over other inputs; None where their ranks are not known."""
    ranks = [step.rank(index) for index in others]
    known = [rank for rank in ranks if rank is not None]
    return broadcast(source, max(known, default=0)) if len(known) == len(ranks) else None


def _recoded(part: Part, old: int, new: int, *, rounded: bool = False) -> Part | None:
    """Let the number `old` become `new`; None where it is not known which stored number that is."""
    zero = part.zero_for(old)
    if zero is None:
        return None
    return replace(part, zero=zero, code=new, rounded=part.rounded or rounded)


def _zeros_kept(source: Folded, *, rounded: bool = True) -> Folded | None:
    """The same shape with zeros where they were, and perhaps more of them if `rounded`."""
    parts = [_recoded(part, 0, 0, rounded=rounded) for part in source.parts]
    return _with_parts(source, parts, source.dtype)


def _with_parts(source: Folded, parts: list[Part | None], dtype: ir.DataType) -> Folded | None:
    known = tuple(part for part in parts if part is not None)
    if len(known) < len(parts):
        return None
    return replace(source, parts=known, dtype=dtype, quantized=None)


def _zero_point(step: Step) -> int | None:
    """The zero point that all elements share, None if they differ or it is not known."""
    if not step.has(2):
        return 0
    array = step.array(2)
    if array is None or not array.size:
        return None
    points = np.unique(array.astype(np.float64))
    return int(points[0]) if len(points) == 1 and np.isfinite(points[0]) else None


def _is_finite(step: Step) -> bool:
    """Whether a scale keeps zero zero; one that is not known is taken to."""
    array = step.array(1)
    return array is None or bool(np.isfinite(array.astype(np.float64)).all())


def _bound(step: Step, index: int, attribute: str) -> float | None:
    """A bound of Clip, infinite where it is left out, None where it is not known."""
    if step.has(index):
        array = step.array(index)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None
    given = step.node.attributes.get(attribute)
    if given is None:
        return float("inf") if index == 2 else float("-inf")
    return float(given.value) if given.type == ir.AttributeType.FLOAT else None


def _is_zero(step: Step, index: int) -> bool:
    array = step.array(index)
    return array is not None and not np.any(array)


def _is_full(step: Step) -> bool:
    """Whether a condition may differ along an axis."""
    lengths = step.lengths(0)
    return lengths is None or any(length != 1 for length in lengths)


def _holds(dtype: ir.DataType, other: ir.DataType) -> bool:
    """Whether a type can hold every number of another one but zero without making it zero."""
    if dtype == ir.DataType.BOOL or dtype == other:
        return True
    try:
        wide, narrow = dtype.numpy(), other.numpy()
        return bool(np.can_cast(narrow, wide, "safe"))
    except TypeError:
        return False


ARITHMETIC: Mapping[str, Rule] = {
    "Cast": cast,
    "CastLike": cast,
    "Clip": clip,
    "Add": add,
    "Sub": add,
    "Min": limit,
    "Max": limit,
    "Mul": multiply,
    "Div": divide,
    "Where": where,
    **dict.fromkeys(ZERO_KEEPING, keeping_zeros),
}
