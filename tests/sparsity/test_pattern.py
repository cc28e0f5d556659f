"""2:4 masks against enumeration."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import best_mask

from prox24_deploy.sparsity.pattern import first_violation, is_24, mask_24, project_24

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: 4 * n), st.integers(1, 3))


@settings(max_examples=60)
@given(shape=SHAPES, seed=st.integers(0, 1000), levels=st.sampled_from([2, 3, 100]))
def test_the_mask_keeps_the_best_pair_of_every_group(
    shape: tuple[int, int, int], seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, shape, generator=generator).double()
    mask = mask_24(score, 1)
    groups = score.movedim(1, -1).reshape(-1, 4)
    kept = mask.movedim(1, -1).reshape(-1, 4)
    assert bool((kept.sum(1) == 2).all())
    for group, keep in zip(groups, kept, strict=True):
        assert float(group[keep].sum()) == best_mask(group.numpy())


def test_ties_go_to_the_lower_index() -> None:
    assert mask_24(torch.zeros(4)).tolist() == [True, True, False, False]
    assert mask_24(torch.tensor([0.0, 1, 1, 1])).tolist() == [False, True, True, False]
    assert mask_24(torch.tensor([2.0, 1, 3, 1])).tolist() == [True, False, True, False]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_any_axis_is_the_same_as_moving_it_last(axis: int) -> None:
    score = torch.randn(8, 4, 12, generator=torch.Generator().manual_seed(1))
    moved = mask_24(score.movedim(axis, -1).contiguous())
    assert torch.equal(mask_24(score, axis).movedim(axis, -1), moved)


@pytest.mark.parametrize(("kept", "group"), [(1, 2), (2, 4), (4, 8), (1, 4)])
def test_other_patterns_follow_the_same_rule(kept: int, group: int) -> None:
    weight = torch.randn(5, 2 * group, generator=torch.Generator().manual_seed(2))
    projected = project_24(weight, kept=kept, group=group)
    assert is_24(projected, kept=kept, group=group)
    for row, number in itertools.product(range(5), range(2)):
        part = slice(number * group, (number + 1) * group)
        largest = weight[row, part].abs().topk(kept).values.sum()
        assert torch.allclose(projected[row, part].abs().sum(), largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_projection_keeps_values_and_writes_positive_zeros(dtype: torch.dtype) -> None:
    weight = torch.tensor([[-1.0, -2.0, -3.0, -4.0, 5.0, -0.0, -0.5, 0.25]]).to(dtype)
    projected = project_24(weight)
    assert projected.tolist() == [[0.0, 0.0, -3.0, -4.0, 5.0, 0.0, -0.5, 0.0]]
    assert not bool(torch.signbit(projected[projected == 0]).any())
    assert projected.dtype == dtype


def test_projection_is_idempotent() -> None:
    once = project_24(torch.randn(7, 16, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(project_24(once), once)


@settings(max_examples=60)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_the_first_violation_is_the_one_a_loop_finds(
    shape: tuple[int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(shape, generator=generator) < 0.45).float()
    values = weight.numpy()
    expected = None
    for a, c, group in itertools.product(range(shape[0]), range(shape[2]), range(shape[1] // 4)):
        if np.count_nonzero(values[a, 4 * group : 4 * group + 4, c]) > 2:
            expected = (a, 4 * group, c)
            break
    assert first_violation(weight, 1) == expected
    assert is_24(weight, 1) is (expected is None)
    assert first_violation(weight, -2) == expected


def test_an_axis_that_does_not_divide_is_named() -> None:
    with pytest.raises(ValueError, match=r"axis 0 of a tensor of shape \(6, 4\) has length 6"):
        mask_24(torch.zeros(6, 4), 0)
    assert not is_24(torch.zeros(6, 4), 0)
    assert is_24(torch.zeros(6, 4), 1)
