import itertools

import ml_dtypes
import numpy as np
import pytest
from graph_models import DTYPES, array_24
from hypothesis import given, settings
from hypothesis import strategies as st

from prox24_deploy.sparsity import groups
from prox24_deploy.sparsity.groups import Array, count_groups, count_nonzeros


def oracle(array: Array, axis: int, zero: int = 0) -> tuple[int, int, tuple[int, ...] | None]:
    """Non-zeros, bad groups and first bad group, element by element, from the definition."""
    starts = [range(n) if i != axis else range(0, n, 4) for i, n in enumerate(array.shape)]
    bad = []
    for index in itertools.product(*starts):
        members = [
            array[*index[:axis], index[axis] + i, *index[axis + 1 :]].item() for i in range(4)
        ]
        if sum(member != zero for member in members) > 2:
            bad.append(index)
    nonzeros = sum(value.item() != zero for value in array.reshape(-1))
    return nonzeros, len(bad), bad[0] if bad else None


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, int]:
    rank = draw(st.integers(1, 4))
    axis = draw(st.integers(0, rank - 1))
    shape = [draw(st.integers(1, 5)) for _ in range(rank)]
    shape[axis] *= 4
    dtype = draw(st.sampled_from([*DTYPES.values(), np.dtype(np.int8), np.dtype(np.float64)]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keep = generator.random(shape) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    sign = generator.choice([-1, 1], shape)
    values = np.where(keep, sign * generator.integers(1, 9, shape), 0.0 * sign)
    return values.astype(dtype), axis


@settings(max_examples=150)
@given(cases())
def test_counts_agree_with_the_definition_for_any_rank_axis_and_dtype(
    case: tuple[Array, int],
) -> None:
    array, axis = case
    count = count_groups(array, axis)
    assert (count.nonzeros, count.bad_groups, count.first) == oracle(array, axis)
    assert count.groups == array.size // 4
    assert count_nonzeros(array) == count.nonzeros


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slab_borders_do_not_change_the_counts(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.random.default_rng(1).integers(0, 2, (8, 12, 4)).astype(np.float32)
    whole = count_groups(array, axis)
    assert whole.first == oracle(array, axis)[2]
    # A first bad group beyond the first slab is numbered from the start of the array.
    late = array.copy()
    late[:6] = 0
    expected = count_groups(late, axis)
    monkeypatch.setattr(groups, "_SLAB_ELEMENTS", 16)
    assert count_groups(array, axis) == whole
    assert count_groups(late, axis) == expected
    assert count_nonzeros(array) == whole.nonzeros


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_negative_zero_is_zero_and_nan_and_subnormals_are_not(dtype: str) -> None:
    row = np.array([-0.0, -0.0, 1.0, 2.0, np.nan, 0.0, 0.0, -1.0]).astype(DTYPES[dtype])
    # The smallest subnormal of every IEEE 754 format has the bits of the integer 1.
    row.view(f"u{row.itemsize}")[5] = 1
    count = count_groups(row, 0)
    assert (count.nonzeros, count.bad_groups) == (5, 1)
    assert (count.first, count.first_nonzeros) == ((4,), 3)


def test_zero_point_counts_as_zero() -> None:
    array = np.array([[5, 5, 1, 0], [5, 0, 1, 2]], np.uint8)
    count = count_groups(array, 1, zero=5)
    assert (count.nonzeros, count.first, count.first_nonzeros) == (5, (1, 0), 3)


def test_float8_and_int4_are_counted() -> None:
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.int4):
        array = np.array([[1, 2, 0, 0, 1, 2, 3, 0]]).astype(dtype)
        assert count_groups(array, 1).first == (0, 4)


def test_empty_array_has_no_groups() -> None:
    count = count_groups(np.zeros((0, 8), np.float32), 1)
    assert (count.groups, count.nonzeros, count.first) == (0, 0, None)


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_axis_without_whole_groups_is_refused(axis: int) -> None:
    with pytest.raises(ValueError, match=rf"axis {axis} of shape \(6, 8\) has no whole groups"):
        count_groups(np.zeros((6, 8), np.float32), axis)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_pattern_is_accepted_along_its_own_axis_only(dtype: str, axis: int) -> None:
    array = array_24((16, 16, 8, 4), axis, dtype)
    assert [count_groups(array, other).bad_groups == 0 for other in range(4)] == [
        other == axis for other in range(4)
    ]
