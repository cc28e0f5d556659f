import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_deploy.graph.check.strided import Strided, c_strides
from prox24_deploy.sparsity.groups import Array

SHAPES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def factors(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of `size` elements, with ones in it."""
    shape = []
    while size > 1:
        divisors = [n for n in range(2, size + 1) if size % n == 0]
        shape.append(draw(st.sampled_from(divisors)))
        size //= shape[-1]
    return tuple(draw(st.permutations([*shape, *[1] * draw(st.integers(0, 2))])))


def step(draw: st.DrawFn, view: Strided, array: Array) -> tuple[Strided, Array]:
    """Do one operation to a view and to the array that it should show."""
    more = ["slice", "split", "merge"] if array.ndim else []
    kinds = ["transpose", "reshape", "expand", "insert", "outer", *more]
    kind = draw(st.sampled_from(kinds))
    if kind == "transpose":
        order = draw(st.permutations(range(array.ndim)))
        return view.transpose(order), array.transpose(order)
    if kind == "expand":
        shape = tuple(draw(st.sampled_from([n, 3])) if n == 1 else n for n in array.shape)
        made = view.expand((2, *shape))
        assert made is not None
        return made, np.broadcast_to(array, (2, *shape))
    if kind == "insert":
        axis = draw(st.integers(0, array.ndim))
        return view.insert(axis), np.expand_dims(array, axis)
    if kind == "outer":
        return view.outer([(3, 0)]), np.broadcast_to(array, (3, *array.shape))
    if kind == "reshape":
        shape = factors(draw, array.size)
        renumbered = view.reshape(shape)
        expected = array.reshape(shape)
        if renumbered is None:
            # NumPy had to copy as well: no fixed strides describe the result.
            assert not np.shares_memory(expected, array)
            return view, array
        return renumbered, expected
    axis = draw(st.integers(0, array.ndim - 1))
    if kind == "split":
        pieces = draw(st.sampled_from([n for n in (1, 2, 3) if array.shape[axis] % n == 0]))
        shape = (*array.shape[:axis], pieces, -1, *array.shape[axis + 1 :])
        return view.split(axis, pieces), array.reshape(shape)
    if kind == "merge":
        count = draw(st.integers(1, array.ndim - axis))
        shape = (*array.shape[:axis], -1, *array.shape[axis + count :])
        merged, expected = view.merge(axis, count), array.reshape(shape)
        if merged is None:
            assert not np.shares_memory(expected, array)
            return view, array
        return merged, expected
    start = draw(st.integers(0, array.shape[axis] - 1))
    stride = draw(st.integers(1, 2))
    cut = array[(slice(None),) * axis + (slice(start, None, stride),)]
    return view.slice(axis, start, cut.shape[axis], stride), cut


@settings(max_examples=300)
@given(st.data(), SHAPES)
def test_a_view_shows_what_numpy_shows(data: st.DataObject, shape: tuple[int, ...]) -> None:
    stored = np.arange(math.prod(shape)).reshape(shape)
    view, array = Strided.of(shape), stored
    for _ in range(data.draw(st.integers(0, 4))):
        view, array = data.draw(st.composite(step)(view, array))
    assert (view.shape, view.size) == (array.shape, array.size)
    assert (view.apply(stored) == array).all()
    index = [data.draw(st.integers(0, length - 1)) for length in array.shape]
    assert view.position(index) == array[tuple(index)]


@settings(max_examples=200)
@given(st.data(), SHAPES.filter(bool))
def test_storage_order_keeps_the_groups_and_reads_forward(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    stored = np.arange(math.prod(shape)).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    axis = data.draw(st.integers(0, len(shape) - 1))
    view, reduction = Strided.of(shape).transpose(order).storage_order(axis)
    lines = np.moveaxis(stored.transpose(order), axis, -1).reshape(-1, shape[order[axis]])
    found = np.moveaxis(view.apply(stored), reduction, -1).reshape(-1, shape[order[axis]])
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, lines.tolist()))
    assert list(view.strides) == sorted(view.strides, reverse=True)
    assert view.stored_axis(reduction, shape) in range(len(shape))
    if shape[order[axis]] > 1:
        assert view.stored_axis(reduction, shape) == order[axis]


def test_a_block_has_bounds_and_anything_else_has_none() -> None:
    whole = Strided.of((4, 6))
    assert whole.box((4, 6)) == ((0, 4), (0, 6))
    assert whole.slice(1, 2, 3).box((4, 6)) == ((0, 4), (2, 5))
    assert whole.slice(1, 0, 3, 2).box((4, 6)) is None
    assert whole.slice(0, 0, 0).box((4, 6)) is None


def test_elements_that_an_array_has_not_are_never_shown() -> None:
    for view in (Strided(4, (3,), (1,)), Strided(-1, (2,), (1,)), Strided(2, (2,), (-3,))):
        with pytest.raises(ValueError, match=r"elements -?\d to -?\d of 6 are looked at"):
            view.apply(np.zeros(6))


def test_shapes_that_do_not_fit_are_refused() -> None:
    assert Strided.of((2, 3)).reshape((5,)) is None
    assert Strided.of((2, 3)).expand((4, 3)) is None


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0, 3)])
def test_scalars_vectors_and_empty_tensors_are_views_too(shape: tuple[int, ...]) -> None:
    stored = np.zeros(shape)
    assert Strided.of(shape).apply(stored).shape == shape
    assert len(c_strides(shape)) == len(shape)
    flat = Strided.of(shape).reshape((stored.size,))
    assert flat is not None
    assert flat.apply(stored).shape == (stored.size,)
