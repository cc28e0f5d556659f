"""Which elements of a stored tensor a constant expression reads, and in which order.

Transpose, Reshape, Slice, Split and their kin only renumber elements. As long as the new numbering
steps through the storage by a fixed stride per axis, the stored bytes themselves can be checked,
with no copy and with every finding given back as an index of the stored tensor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from prox24_deploy.sparsity.groups import Array


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of a tensor in C order; `offset` and `strides` count elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Strided":
        """View of a whole tensor of that shape."""
        return cls(0, tuple(shape), c_strides(shape))

    @property
    def size(self) -> int:
        """Number of elements that the view shows, repeated ones included."""
        return math.prod(self.shape)

    def transpose(self, order: Sequence[int]) -> "Strided":
        """Axis i of the result is axis `order[i]` of this view."""
        return Strided(
            self.offset,
            tuple(self.shape[axis] for axis in order),
            tuple(self.strides[axis] for axis in order),
        )

    def slice(self, axis: int, start: int, length: int, step: int = 1) -> "Strided":
        """Take `length` elements of one axis, from `start` on, every `step`-th."""
        shape, strides = list(self.shape), list(self.strides)
        offset = self.offset + start * strides[axis] if length else self.offset
        shape[axis] = length
        strides[axis] *= step
        return Strided(offset, tuple(shape), tuple(strides))

    def insert(self, axis: int) -> "Strided":
        """Put an axis of length one before `axis`."""
        shape = (*self.shape[:axis], 1, *self.shape[axis:])
        return Strided(self.offset, shape, (*self.strides[:axis], 0, *self.strides[axis:]))

    def outer(self, axes: Sequence[tuple[int, int]]) -> "Strided":
        """Put axes, each as (length, stride), before all others."""
        return Strided(
            self.offset,
            (*(length for length, _ in axes), *self.shape),
            (*(stride for _, stride in axes), *self.strides),
        )

    def split(self, axis: int, pieces: int) -> "Strided":
        """Turn one axis into two: that of equal pieces, and that of the elements of a piece."""
        length, stride = self.shape[axis] // pieces, self.strides[axis]
        return Strided(
            self.offset,
            (*self.shape[:axis], pieces, length, *self.shape[axis + 1 :]),
            (*self.strides[:axis], stride * length, stride, *self.strides[axis + 1 :]),
        )

    def merge(self, axis: int, count: int) -> "Strided | None":
        """Make one axis of neighbouring ones, None where no fixed stride steps through them."""
        inner = Strided(0, self.shape[axis : axis + count], self.strides[axis : axis + count])
        merged = inner.reshape((inner.size,))
        if merged is None:
            return None
        return Strided(
            self.offset,
            (*self.shape[:axis], *merged.shape, *self.shape[axis + count :]),
            (*self.strides[:axis], *merged.strides, *self.strides[axis + count :]),
        )

    def expand(self, shape: Sequence[int]) -> "Strided | None":
        """Broadcast to a shape by the rules of ONNX and NumPy, None where they forbid it."""
        try:
            full = np.broadcast_shapes(self.shape, tuple(shape))
        except ValueError:
            return None
        own = (1,) * (len(full) - len(self.shape)) + self.shape
        steps = (0,) * (len(full) - len(self.shape)) + self.strides
        strides = (s if n == m else 0 for n, m, s in zip(own, full, steps, strict=True))
        return Strided(self.offset, full, tuple(strides))

    def reshape(self, shape: Sequence[int]) -> "Strided | None":
        """Renumber the elements in C order, None where no fixed strides describe the result."""
        if math.prod(shape) != self.size:
            return None
        if not self.size:
            return Strided(self.offset, tuple(shape), c_strides(shape))
        runs = list(self._runs())
        strides = []
        for length in reversed(shape):
            size, stride = runs.pop() if length > 1 else (1, 1)
            if size % length:
                return None
            strides.append(stride)
            if size > length:
                runs.append((size // length, stride * length))
        return Strided(self.offset, tuple(shape), tuple(reversed(strides)))

    def storage_order(self, axis: int) -> "tuple[Strided, int]":
        """The same elements in the order in which they are stored, with `axis` kept an axis.

        Other axes are dropped where they repeat elements or hold one, and merged where they can be.
        Two views of the same groups along `axis` become equal.
        """
        kept = [
            (stride, size, i == axis)
            for i, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True))
            if i == axis or not size or (size > 1 and stride)
        ]
        merged: list[tuple[int, int, bool]] = []
        for stride, size, reduced in sorted(kept, key=lambda entry: (-entry[0], entry[1])):
            if merged and not reduced and not merged[-1][2] and merged[-1][0] == stride * size:
                merged[-1] = (stride, merged[-1][1] * size, False)
            else:
                merged.append((stride, size, reduced))
        view = Strided(self.offset, tuple(m[1] for m in merged), tuple(m[0] for m in merged))
        return view, [m[2] for m in merged].index(True)

    def apply(self, array: Array) -> Array:
        """The elements of `array`, in C order, that the view shows; nothing is copied.

        Raises:
            ValueError: the view shows elements that the array has not.
        """
        flat = array.reshape(-1)
        if not self.size:
            return flat[:0].reshape(self.shape)
        last = self.position([length - 1 for length in self.shape])
        if not 0 <= self.offset <= last < flat.size:
            raise ValueError(f"elements {self.offset} to {last} of {flat.size} are looked at")
        strides = [stride * flat.itemsize for stride in self.strides]
        # NumPy cannot step through some types of ml_dtypes, so bare bytes are stepped through.
        bare = flat[self.offset :].view(f"V{flat.itemsize}")
        return as_strided(bare, self.shape, strides, writeable=False).view(flat.dtype)

    def position(self, index: Sequence[int]) -> int:
        """Position in the stored tensor, in C order, of one element of the view."""
        return self.offset + sum(i * s for i, s in zip(index, self.strides, strict=True))

    def box(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
        """Bounds per axis of a stored tensor of that shape, None if the view is no such block."""
        if not self.size:
            return None
        first = np.unravel_index(self.offset, shape)
        last = np.unravel_index(self.position([length - 1 for length in self.shape]), shape)
        bounds = tuple((int(a), int(b) + 1) for a, b in zip(first, last, strict=True))
        full = math.prod(max(0, end - begin) for begin, end in bounds) == self.size
        return bounds if full else None

    def stored_axis(self, axis: int, shape: Sequence[int]) -> int:
        """Axis of a stored tensor of that shape along which the elements of `axis` follow."""
        step, length = self.strides[axis], self.shape[axis]
        stored = list(zip(c_strides(shape), shape, strict=True))
        if (step, length) in stored:
            return stored.index((step, length))
        below = [i for i, (stride, size) in enumerate(stored) if stride <= step and size > 1]
        return min(below, default=0)

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Axes as (size, stride), neighbours merged where one stride steps through both."""
        size, stride = 1, 0
        for length, step in zip(self.shape, self.strides, strict=True):
            if length == 1:
                continue
            if size > 1 and stride != length * step:
                yield size, stride
                size = 1
            size, stride = size * length, step
        if size > 1:
            yield size, stride


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor in C order."""
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))[len(strides) - len(shape) :] if shape else ()
