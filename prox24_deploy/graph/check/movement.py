"""Nodes that renumber the elements of a constant without changing them.

Each function takes a `Step` whose first input is `Folded`, and gives the source of its result, or
None where this use of the operator is not followed. A renumbering that depends on values known at
run time alone leaves the axis that it runs along torn.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from prox24_deploy.graph.check import attributes
from prox24_deploy.graph.check.sources import (
    Folded,
    Source,
    broadcast,
    cut,
    dropped,
    inserted,
    joined,
    place,
    renumbered,
    reshaped,
    selected,
    tear,
    transposed,
    widest,
)
from prox24_deploy.graph.check.step import Step

# No tensor has more axes, and NumPy knows no more.
_MOST_AXES = 32

Rule = Callable[[Step, Folded], Source | None]


def transpose(step: Step, source: Folded) -> Source | None:
    """Transpose."""
    order = attributes.integers(step.node, "perm")
    return transposed(source, tuple(reversed(range(len(source.shape)))) if order is None else order)


def reshape(step: Step, source: Folded) -> Source | None:
    """Reshape, with 0 for a length that stays and -1 for what is left."""
    wanted = step.numbers(1, "shape")
    if wanted is None or len(wanted) > _MOST_AXES or min(wanted, default=0) < -1:
        return None
    keeps = not step.integer("allowzero", 0)
    if keeps and any(n == 0 and i >= len(source.shape) for i, n in enumerate(wanted)):
        return None
    shape = [
        n if n or not keeps else -1 if i in source.torn else source.shape[i]
        for i, n in enumerate(wanted)
    ]
    if -1 in shape and not source.torn:
        rest = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = math.prod(source.shape) // rest if rest else 0
    return reshaped(source, shape)


def flatten(step: Step, source: Folded) -> Source | None:
    """Flatten to two axes."""
    rank = len(source.shape)
    axis = step.integer("axis", 1)
    if not -rank <= axis <= rank:
        return None
    axis = axis if axis >= 0 else axis + rank
    front = -1 if any(i < axis for i in source.torn) else math.prod(source.shape[:axis])
    return reshaped(source, (front, math.prod(source.shape[axis:])))


def squeeze(step: Step, source: Folded) -> Source | None:
    """Squeeze of the given axes, or of all that are one long."""
    ones = tuple(i for i, n in enumerate(source.shape) if n == 1 and i not in source.torn)
    axes = step.numbers(1, "axes", None if source.torn else ones)
    places = _places(axes, len(source.shape))
    if places is None or any(source.shape[i] != 1 for i in places):
        return None
    for axis in reversed(places):
        source = dropped(source, axis)
    return source


def unsqueeze(step: Step, source: Folded) -> Source | None:
    """Unsqueeze."""
    axes = step.numbers(1, "axes")
    places = None if axes is None else _places(axes, len(source.shape) + len(axes))
    if places is None or len(source.shape) + len(places) > _MOST_AXES:
        return None
    for axis in places:
        source = inserted(source, axis)
    return source


def expand(step: Step, source: Folded) -> Source | None:
    """Expand; lengths known at run time alone may repeat what is one long."""
    shape = step.numbers(1)
    if step.has(1) and not step.is_constant(1):
        lengths = step.lengths(1)
        # How many axes there are then is told by how many lengths there are.
        if lengths is None or len(lengths) != 1 or lengths[0] is None:
            return None
        return broadcast(selected(source), min(lengths[0], _MOST_AXES))
    if shape is None or len(shape) > _MOST_AXES:
        return None
    found = renumbered(source, shape, expand=True)
    more = 0 if found is None else len(found.shape) - len(source.shape)
    return found and replace(found, torn=frozenset(axis + more for axis in source.torn))


def sliced(step: Step, source: Folded) -> Source | None:
    """Slice with bounds as inputs (opset 10) or attributes; backward steps are not followed."""
    given = [index for index in (1, 2, 3, 4) if step.has(index)]
    starts, ends = step.numbers(1, "starts"), step.numbers(2, "ends")
    count = len(source.shape) if starts is None else len(starts)
    axes = _places(step.numbers(3, "axes", tuple(range(count))), len(source.shape))
    if axes is None:
        return None
    if not all(step.is_constant(index) for index in given):
        return tear(selected(source), axes)
    steps = step.numbers(4, "steps", (1,) * count)
    if starts is None or ends is None or steps is None or min(steps, default=1) < 1:
        return None
    told = step.numbers(3, "axes", tuple(range(count))) or ()
    for start, end, axis, stride in zip(starts, ends, told, steps, strict=False):
        at = axis % len(source.shape)
        bounds = slice(start, end, stride).indices(source.shape[at])
        source = cut(source, at, range(*bounds))
    return source


def split(step: Step, source: Folded) -> Source | None:
    """Split into equal parts, or into parts of given lengths."""
    axis = place(step.integer("axis", 0), len(source.shape))
    if axis is None:
        return None
    if step.has(1) and not step.is_constant(1):
        return tear(selected(source), [axis])
    count = len(step.node.outputs)
    # Any other number is against the standard, and may be one that nobody can count to.
    if step.integer("num_outputs", count) != count:
        return None
    chunk = -(-source.shape[axis] // count)
    lengths = step.numbers(1, "split", (chunk,) * count)
    if lengths is None or step.output >= len(lengths) or min(lengths) < 0:
        return None
    begin = sum(lengths[: step.output])
    end = min(begin + lengths[step.output], source.shape[axis])
    return cut(source, axis, range(min(begin, end), end))


def concat(step: Step, _: Folded) -> Source | None:
    """Concat of constants; with a value known at run time alone it is not followed."""
    sources = [source for source in step.sources if isinstance(source, Folded)]
    if len(sources) < len(step.sources):
        return None
    rank = len(sources[0].shape)
    axis = place(step.integer("axis", 0), rank)
    if axis is None or any(len(source.shape) != rank for source in sources):
        return None
    return joined(sources, axis)


def gather(step: Step, source: Folded) -> Source | None:
    """Gather of one index, known or chosen at run time, or of several chosen at run time."""
    axis = place(step.integer("axis", 0), len(source.shape))
    if axis is None or not step.has(1):
        return None
    if step.is_constant(1):
        picked, index = step.numbers(1), step.source(1)
        if not isinstance(index, Folded) or index.shape or not picked:
            # Several known indices are computed where the tensor is constant too.
            constant = source.nature == "constant"
            return None if constant else _picked(source, axis, step.rank(1))
        at = range(source.shape[axis])[picked[0] :][:1]
        return dropped(cut(source, axis, at), axis) if at or axis in source.torn else None
    return _picked(source, axis, step.rank(1))


def gather_nd(step: Step, source: Folded) -> Source | None:
    """GatherND of slices that are chosen at run time."""
    lengths = step.lengths(1)
    depth = lengths[-1] if lengths else None
    if step.is_constant(1) and source.nature == "constant":
        return None
    if depth is None or not 0 < depth <= len(source.shape):
        return None
    if step.integer("batch_dims", 0):
        return None
    source = tear(selected(source), range(depth))
    for _ in range(depth):
        source = dropped(source, 0)
    for _ in range(len(lengths or ()) - 1):
        source = inserted(source, 0, torn=True)
    return source


def compress(step: Step, source: Folded) -> Source | None:
    """Compress along an axis by a condition that is known at run time alone."""
    axis = step.node.attributes.get("axis")
    if axis is None or not step.has(1) or (step.is_constant(1) and source.nature == "constant"):
        return None
    at = place(step.integer("axis", 0), len(source.shape))
    return None if at is None else tear(selected(source), [at])


def _picked(source: Folded, axis: int, rank: int | None) -> Folded | None:
    """Indices of one axis chosen at run time; `rank` is that of the indices."""
    if rank is None or rank > _MOST_AXES:
        return None
    # Rows of a table by a list of indices are what an embedding looks up.
    table = axis == 0 and len(source.shape) == 2 and rank != 0
    nature = widest(("looked up" if table else "selected", source.nature))
    source = dropped(tear(replace(source, nature=nature), [axis]), axis)
    for _ in range(rank):
        source = inserted(source, axis, torn=True)
    return source


def _places(axes: tuple[int, ...] | None, rank: int) -> list[int] | None:
    """Axes counted from 0, in order; None where they are unknown or outside of the rank."""
    found = [place(axis, rank) for axis in axes] if axes is not None else [None]
    inside = sorted(axis for axis in found if axis is not None)
    return inside if len(set(inside)) == len(found) else None


def dropout(step: Step, source: Folded) -> Source | None:
    """Dropout, which at inference does nothing."""
    return None if step.has(2) or step.output else source


MOVEMENTS: Mapping[str, Rule] = {
    "Identity": lambda _, source: source,
    "Dropout": dropout,
    "Transpose": transpose,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Slice": sliced,
    "Split": split,
    "Concat": concat,
    "Gather": gather,
    "GatherND": gather_nd,
    "Compress": compress,
}
