"""What is known of a value in a graph: which stored constants its elements come from.

Three kinds. `Folded`: every element is one of certain stored elements, and zero where that one is.
`Blocked`: constants reach the value in a way that is not followed. `Runtime`: no constant does.

A `Folded` value may be chosen at run time among several constants, or among slices of one. Then
its parts overlap, or a part has `choices`: axes of the stored tensor of which some index is taken.
An axis that such a choice runs along is `torn`: its length is not known, and elements that follow
each other along it need not be neighbours in the stored tensor.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import onnx_ir as ir

from prox24_deploy.graph.check.constants import is_matrix, sizes_of
from prox24_deploy.graph.check.strided import Strided

# A packed weight is joined from some parts, a stack of experts from some hundred. A Concat of a
# tensor with itself doubles them at every step.
MOST_PARTS = 1024
# A value that is not followed names its largest constants, up to this many.
MOST_STORED = 64

Nature = Literal["constant", "selected", "looked up", "mixed"]
_NATURES: tuple[Nature, ...] = ("constant", "selected", "looked up", "mixed")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Stored:
    """A constant tensor under the name of the value that holds it, or that it is computed from.

    `moved` says that its elements have other places than those of the value, and `made_of` names
    all matrices that a computed one is made of.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    moved: bool = False
    made_of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Elements of one stored tensor, and where in the folded value they begin.

    `choices` are further axes of the stored tensor, as (length, stride), of which some index is
    taken at run time. A stored element equal to `zero` is the number `code` in the folded value;
    None says that every stored number is still itself. `rounded` says that other stored elements
    may have become zero too, `scaled` that a factor known at run time alone may make them so.
    `replaceable` says that a caller of the model can pass another tensor.
    """

    stored: Stored
    view: Strided
    start: tuple[int, ...]
    choices: tuple[tuple[int, int], ...] = ()
    zero: int | None = None
    code: int = 0
    rounded: bool = False
    scaled: bool = False
    replaceable: bool = False

    @classmethod
    def whole(cls, stored: Stored) -> "Part":
        """All elements of a tensor in their order."""
        shape = sizes_of(stored.tensor)
        return cls(stored=stored, view=Strided.of(shape), start=(0,) * len(shape))

    @property
    def is_in_place(self) -> bool:
        """Whether the elements have the places that they have where they are stored."""
        whole = self.view == Strided.of(sizes_of(self.stored.tensor))
        return whole and not self.choices and not self.stored.moved

    def zero_for(self, code: int) -> int | None:
        """The stored number that is `code` in the folded value, None if it is not known."""
        if self.zero is None:
            return code
        return self.zero if code == self.code else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A value as the stored parts that it is put together from.

    `dtype` is that of the values as they arrive, `quantized` the type before the DequantizeLinear
    that they leave, if they come straight from one. Lengths in `shape` hold but for `torn` axes.
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: ir.DataType
    quantized: ir.DataType | None = None
    torn: frozenset[int] = frozenset()
    nature: Nature = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A value whose constants cannot be followed, and why; `remedy` says what would help."""

    stored: tuple[Stored, ...]
    reason: str
    remedy: str
    nature: Nature = "constant"
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """A value that no constant reaches.

    `hot` says that a product, a norm or a softmax computes it, so that it is an activation and no
    scale or mask of a weight. `one_hot` says that each row picks one index.
    """

    hot: bool = False
    one_hot: bool = False


Source = Folded | Blocked | Runtime


def widest(natures: Iterable[Nature]) -> Nature:
    """The nature of a value that is made of values of these."""
    return max(natures, key=_NATURES.index, default="constant")


def has_matrix(source: Source) -> bool:
    """Whether a stored tensor with more than one axis reaches a value; a scale or bias has none."""
    return any(is_matrix(sizes_of(stored.tensor)) for stored in stored_of(source))


def stored_of(*sources: Source) -> tuple[Stored, ...]:
    """Every constant that reaches these values, each once, the largest first."""
    found: dict[ir.Value, Stored] = {}
    for source in sources:
        if isinstance(source, Folded):
            found.update((part.stored.value, part.stored) for part in source.parts)
        elif isinstance(source, Blocked):
            found.update((stored.value, stored) for stored in source.stored)
    ordered = sorted(found.values(), key=lambda stored: -stored.tensor.size)
    return tuple(ordered[:MOST_STORED])


def transposed(source: Folded, order: Sequence[int]) -> Folded | None:
    """Axis i of the result is axis `order[i]`; None if it is no order of the axes."""
    if sorted(order) != list(range(len(source.shape))):
        return None
    parts = tuple(
        replace(
            part, view=part.view.transpose(order), start=tuple(part.start[axis] for axis in order)
        )
        for part in source.parts
    )
    shape = tuple(source.shape[axis] for axis in order)
    torn = frozenset(i for i, axis in enumerate(order) if axis in source.torn)
    return replace(source, parts=parts, shape=shape, torn=torn)


def cut(source: Folded, axis: int, kept: range) -> Folded:
    """Keep some indices of one axis; parts that hold none of them fall away.

    Of a torn axis nothing is known to fall away.
    """
    if axis in source.torn:
        return source
    parts = []
    for part in source.parts:
        begin = part.start[axis]
        # The first kept index that is not before the part.
        first = max(kept.start, begin + (kept.start - begin) % kept.step)
        inside = range(first, min(kept.stop, begin + part.view.shape[axis]), kept.step)
        if inside:
            view = part.view.slice(axis, inside.start - begin, len(inside), kept.step)
            start = put(part.start, axis, (inside.start - kept.start) // kept.step)
            parts.append(replace(part, view=view, start=start))
    return replace(source, parts=tuple(parts), shape=put(source.shape, axis, len(kept)))


def joined(sources: Sequence[Folded], axis: int) -> Folded | None:
    """Lay values behind each other along one axis; None where their shapes do not fit."""
    torn = frozenset[int]().union(*(source.torn for source in sources))
    outlines = {
        tuple(0 if i == axis or i in torn else n for i, n in enumerate(source.shape))
        for source in sources
    }
    kinds = {(source.dtype, source.quantized) for source in sources}
    if len(outlines) > 1 or sum(len(source.parts) for source in sources) > MOST_PARTS:
        return None
    begins = accumulate((source.shape[axis] for source in sources), initial=0)
    parts = tuple(
        replace(part, start=put(part.start, axis, part.start[axis] + begin))
        for source, begin in zip(sources, begins, strict=False)
        for part in source.parts
    )
    length = sum(source.shape[axis] for source in sources)
    return replace(
        sources[0],
        parts=parts,
        shape=put(sources[0].shape, axis, length),
        torn=torn,
        quantized=sources[0].quantized if len(kinds) == 1 else None,
        nature=widest(source.nature for source in sources),
    )


def either(sources: Sequence[Folded]) -> Folded | None:
    """One of several values, chosen as a whole at run time; None where their shapes differ."""
    torn = frozenset[int]().union(*(source.torn for source in sources))
    outlines = {
        tuple(0 if i in torn else n for i, n in enumerate(source.shape)) for source in sources
    }
    parts = tuple(dict.fromkeys(part for source in sources for part in source.parts))
    if len(outlines) > 1 or len(parts) > MOST_PARTS:
        return None
    nature = widest(("selected", *(source.nature for source in sources)))
    return replace(sources[0], parts=parts, torn=torn, nature=nature)


def tear(source: Folded, axes: Iterable[int]) -> Folded:
    """Say of some axes that the indices along them are chosen at run time.

    Parts without elements, of which none can be chosen, fall away.
    """
    for axis in sorted(set(axes) - source.torn):
        parts = []
        for part in source.parts:
            if not part.view.size:
                continue
            picked = (part.view.shape[axis], part.view.strides[axis])
            view = part.view.slice(axis, 0, 1)
            choices = (*part.choices, picked) if picked[0] > 1 else part.choices
            start = put(part.start, axis, 0)
            parts.append(replace(part, view=view, choices=choices, start=start))
        source = replace(source, parts=tuple(parts), shape=put(source.shape, axis, 1))
    return replace(source, torn=source.torn | frozenset(axes))


def selected(source: Folded) -> Folded:
    """The same value, chosen at run time."""
    return replace(source, nature=widest(("selected", source.nature)))


def dropped(source: Folded, axis: int) -> Folded:
    """Leave out an axis of length one, or one that is torn."""
    keep = [i for i in range(len(source.shape)) if i != axis]
    parts = tuple(
        replace(part, view=part.view.transpose(keep), start=tuple(part.start[i] for i in keep))
        for part in source.parts
    )
    torn = frozenset(i - (i > axis) for i in source.torn if i != axis)
    return replace(source, parts=parts, shape=tuple(source.shape[i] for i in keep), torn=torn)


def inserted(source: Folded, axis: int, *, torn: bool = False) -> Folded:
    """Put in an axis of length one, or one whose length is not known."""
    parts = tuple(
        replace(
            part,
            view=part.view.insert(axis),
            start=(*part.start[:axis], 0, *part.start[axis:]),
        )
        for part in source.parts
    )
    shape = (*source.shape[:axis], 1, *source.shape[axis:])
    moved = frozenset(i + (i >= axis) for i in source.torn) | frozenset([axis] if torn else [])
    return replace(source, parts=parts, shape=shape, torn=moved)


def renumbered(source: Folded, shape: Sequence[int], *, expand: bool = False) -> Folded | None:
    """Give the elements of one part another shape, if fixed strides still describe them.

    Parts that overlap and are all whole count as one each.
    """
    if any(any(part.start) or part.view.shape != source.shape for part in source.parts):
        return None
    parts = []
    for part in source.parts:
        view = part.view.expand(shape) if expand else part.view.reshape(shape)
        if view is None:
            return None
        parts.append(replace(part, view=view, start=(0,) * len(view.shape)))
    if not parts:
        return None
    return replace(source, parts=tuple(parts), shape=parts[0].view.shape)


def reshaped(source: Folded, wanted: Sequence[int]) -> Folded | None:
    """Reshape to lengths of which -1, or any along torn axes, need not be known.

    Behind the last torn axis, elements lie as they do in one of the slices that are chosen, and
    take a new shape among themselves.
    """
    if not source.torn:
        return renumbered(source, wanted) if -1 not in wanted else None
    for begin in range(max(source.torn) + 1, len(source.shape) + 1):
        size = math.prod(source.shape[begin:])
        for behind in range(len(wanted), -1, -1):
            rest = tuple(wanted[behind:])
            if -1 in rest or math.prod(rest) > size:
                break
            if math.prod(rest) == size and (begin < len(source.shape) or not rest):
                return _reshaped_behind(source, begin, behind, rest)
    return None


def _reshaped_behind(
    source: Folded, begin: int, front: int, rest: tuple[int, ...]
) -> Folded | None:
    """Reshape the axes from `begin` on to `rest`; `front` axes of unknown length lie before."""
    source = tear(source, range(begin))
    for _ in range(begin):
        source = dropped(source, 0)
    found = renumbered(source, rest)
    for _ in range(front if found else 0):
        found = inserted(found, 0, torn=True) if found else None
    return found


def scaled_by_runtime(source: Folded) -> Folded | None:
    """Multiply by what is known at run time alone; None where zeros would not stay zero."""
    if any(part.zero_for(0) is None for part in source.parts):
        return None
    parts = tuple(
        replace(part, zero=part.zero_for(0), code=0, scaled=True) for part in source.parts
    )
    return replace(source, parts=parts, nature="mixed")


def broadcast(source: Folded, rank: int) -> Folded:
    """Meet a value of some rank, whose lengths are not known.

    It may add axes before all others, and be longer than one where this one is one long.
    """
    for _ in range(rank - len(source.shape)):
        source = inserted(source, 0, torn=True)
    ones = [axis for axis, length in enumerate(source.shape) if length == 1]
    return tear(source, ones if rank else [])


def put(numbers: tuple[int, ...], axis: int, number: int) -> tuple[int, ...]:
    """The numbers with another one at one place."""
    return (*numbers[:axis], number, *numbers[axis + 1 :])


def place(axis: int, rank: int) -> int | None:
    """An axis counted from 0, None if it lies outside of the rank."""
    return axis % rank if -rank <= axis < rank else None
