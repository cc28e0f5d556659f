"""Count the non-zeros in groups of four along one axis of an array.

The array is walked in slabs of a fixed number of elements, so that a memory-mapped weight of any
size needs only a few MiB of working memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GROUP = 4
KEEP = 2

# 2**18 elements and their flags stay inside a CPU's second-level cache.
_SLAB_ELEMENTS = 1 << 18
_SHORT_ROW = 64
_HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCount:
    """What the groups of one array hold.

    `first` is the index of the first element of the first group (in C order) with more than two
    non-zeros and `first_nonzeros` its count; None and 0 when every group obeys.
    """

    nonzeros: int
    groups: int
    bad_groups: int
    first: tuple[int, ...] | None
    first_nonzeros: int


def count_groups(array: Array, axis: int, zero: int = 0) -> GroupCount:
    """Count non-zeros per group of four consecutive elements along `axis`.

    Both zeros of IEEE 754 count as zero, NaN and subnormal numbers as non-zero.

    Args:
        array: any rank from 1, any real dtype of NumPy or ml_dtypes, any strides.
        axis: the reduction axis; its length must be a multiple of four.
        zero: the stored integer that stands for zero (the zero point of a quantised weight).

    Raises:
        ValueError: the axis is not one of the array's, or its length is not a multiple of four.
    """
    if not 0 <= axis < array.ndim or array.shape[axis] % GROUP:
        raise ValueError(f"axis {axis} of shape {array.shape} has no whole groups of {GROUP}")
    nonzeros = bad_groups = first_nonzeros = 0
    first = None
    for start, slab in _slabs(array, axis, (0,) * array.ndim, 0):
        flags = _nonzero(slab, zero)
        nonzeros += int(np.count_nonzero(flags))
        counts = _per_group(flags, axis)
        bad = counts > KEEP
        found = int(np.count_nonzero(bad))
        if found and first is None:
            where = int(bad.argmax())
            first_nonzeros = int(counts.reshape(-1)[where])
            inside = _element_index(slab.shape, axis, where)
            first = tuple(i + j for i, j in zip(start, inside, strict=True))
        bad_groups += found
    return GroupCount(
        nonzeros=nonzeros,
        groups=array.size // GROUP,
        bad_groups=bad_groups,
        first=first,
        first_nonzeros=first_nonzeros,
    )


def count_nonzeros(array: Array, zero: int = 0) -> int:
    """Count the elements that are not zero, by the rules of `count_groups`."""
    slabs = _slabs(array, -1, (0,) * array.ndim, 0) if array.ndim else [((), array)]
    return sum(int(np.count_nonzero(_nonzero(slab, zero))) for _, slab in slabs)


def _slabs(
    array: Array, grouped: int, start: tuple[int, ...], axis: int
) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Cut an array into pieces of bounded size, in C order, no group of `grouped` in two.

    Yields each piece with the index of its first element. Cuts go along `axis`, and along the next
    one where a single step of it is too long.
    """
    if not array.size:
        return
    unit = GROUP if axis == grouped else 1
    steps = _SLAB_ELEMENTS * array.shape[axis] // (array.size * unit)
    step = unit * max(1, steps)
    for begin in range(0, array.shape[axis], step):
        piece = array[(slice(None),) * axis + (slice(begin, begin + step),)]
        at = (*start[:axis], begin, *start[axis + 1 :])
        if steps or axis == array.ndim - 1:
            yield at, piece
        else:
            yield from _slabs(piece, grouped, at, axis + 1)


def _nonzero(slab: Array, zero: int) -> npt.NDArray[np.bool_]:
    if zero == 0 and slab.dtype in _HALVES:
        # Comparing 16-bit floats is many times slower than dropping the sign of their bits.
        return (slab.view(np.uint16) & np.uint16(0x7FFF)).astype(np.bool_)
    return np.asarray(slab != np.asarray(zero).astype(slab.dtype), dtype=np.bool_)


def _per_group(flags: npt.NDArray[np.bool_], axis: int) -> npt.NDArray[np.uint8]:
    """Sum flags in groups of four along an axis, which becomes as many times shorter."""
    flags = np.ascontiguousarray(flags)
    if axis == flags.ndim - 1:
        # Four flags of one byte each are one 32-bit word.
        return np.bitwise_count(flags.view(np.uint32))
    shape = (*flags.shape[:axis], flags.shape[axis] // GROUP, *flags.shape[axis + 1 :])
    inner = math.prod(shape[axis + 1 :])
    ones = flags.view(np.uint8)
    if inner < _SHORT_ROW:
        # Long sums at every place, of which one in four is kept, beat many short sums.
        sums = ones.flatten()
        for shift in range(inner, GROUP * inner, inner):
            sums[:-shift] += ones.reshape(-1)[shift:]
        return sums.reshape(-1, GROUP * inner)[:, :inner].reshape(shape)
    rows = np.moveaxis(ones.reshape(*shape[: axis + 1], GROUP, *shape[axis + 1 :]), axis + 1, 0)
    return np.asarray(rows[0] + rows[1] + rows[2] + rows[3])


def _element_index(shape: tuple[int, ...], axis: int, group: int) -> tuple[int, ...]:
    """Index of the first element of a group, from the group's C-order number."""
    grouped = (*shape[:axis], shape[axis] // GROUP, *shape[axis + 1 :])
    index = [int(i) for i in np.unravel_index(group, grouped)]
    index[axis] *= GROUP
    return tuple(index)
