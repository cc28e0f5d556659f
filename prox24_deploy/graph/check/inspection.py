"""Look at the groups of four of one stored tensor and say in words what they hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prox24_deploy.graph.check.strided import Strided, c_strides
from prox24_deploy.sparsity.groups import GROUP, Array, GroupCount, count_groups, count_nonzeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a view of a stored tensor holds; an empty `reason` means that it is 2:4.

    `part` and `shape` are the slice that the view is, `first` the index, in the stored tensor, of
    the first element of the first group that is not 2:4.
    """

    density: float
    first: tuple[int, ...] | None
    reason: str
    part: str
    shape: tuple[int, ...]


def inspect_groups(
    array: Array, view: Strided, reduction: int, axis: int, zero: int, obstacle: str
) -> Finding:
    """Count the groups that a view shows of a stored array.

    Args:
        array: the whole stored tensor.
        view: the elements to look at.
        reduction: axis of the view along which four consecutive elements are a group.
        axis: the same axis of the stored array.
        zero: the stored integer that stands for zero.
        obstacle: why the groups cannot be known; then only non-zeros are counted.
    """
    shown = view.apply(array)
    part, shape = _part(view, array.shape)
    length = shown.shape[reduction] if shown.ndim else 0
    if not obstacle and length % GROUP:
        obstacle = f"reduction length {length} is not a multiple of {GROUP}"
    if obstacle:
        density = count_nonzeros(shown, zero) / max(1, shown.size)
        return Finding(density=density, first=None, reason=obstacle, part=part, shape=shape)
    count = count_groups(shown, reduction, zero)
    first, reason = None, ""
    if count.first is not None:
        position = view.position(count.first)
        first = tuple(int(i) for i in np.unravel_index(position, array.shape))
        consecutive = view.strides[reduction] == c_strides(array.shape)[axis]
        fits = consecutive and first[axis] + GROUP <= array.shape[axis]
        reason = _violation(count, first, axis if fits else -1)
    return Finding(
        density=count.nonzeros / max(1, shown.size),
        first=first,
        reason=reason,
        part=part,
        shape=shape,
    )


def unread(reason: str, shape: tuple[int, ...]) -> Finding:
    """Finding of a tensor that was not looked at, with the reason."""
    return Finding(density=0.0, first=None, reason=reason, part="", shape=shape)


def _part(view: Strided, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The slice that a view is, as text, and its shape; "" for a whole tensor."""
    box = view.box(shape)
    if box is None:
        return ("", shape) if not view.size else (f"{view.size} elements", shape)
    if all(bounds == (0, length) for bounds, length in zip(box, shape, strict=True)):
        return "", shape
    texts = [
        ":" if bounds == (0, length) else f"{bounds[0]}:{bounds[1]}"
        for bounds, length in zip(box, shape, strict=True)
    ]
    return f"[{', '.join(texts)}]", tuple(end - begin for begin, end in box)


def _violation(count: GroupCount, first: Sequence[int], axis: int) -> str:
    """Say where the first bad group is: a slice along `axis`, only its first element if -1."""
    index = [str(i) for i in first]
    if axis >= 0:
        index[axis] = f"{first[axis]}:{first[axis] + GROUP}"
    where = f"[{', '.join(index)}]" if axis >= 0 else f"from [{', '.join(index)}] on"
    verb = "is" if count.bad_groups == 1 else "are"
    return (
        f"{count.first_nonzeros} non-zeros in group {where} "
        f"({count.bad_groups} of {count.groups} groups {verb} not 2:4)"
    )
