"""The search for an order of channels: against brute force, and what must hold of any order."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prox24_deploy.pruning import permute_search
from prox24_deploy.pruning.permute_search import kept, reordered, retained, search_order


def scores(sets: int, rows: int, channels: int, seed: int) -> Tensor:
    return torch.rand(sets, rows, channels, generator=torch.Generator().manual_seed(seed)) ** 3


def kept_by(score: Tensor, four: tuple[int, ...]) -> float:
    return float(score[:, list(four)].topk(2).values.double().sum())


@pytest.mark.parametrize("seed", range(5))
def test_of_eight_channels_the_best_of_all_splits_is_found(seed: int) -> None:
    score = scores(1, 7, 8, seed)
    best = max(
        kept_by(score[0], four) + kept_by(score[0], tuple({*range(8)} - {*four}))
        for four in combinations(range(8), 4)
    )
    found = search_order(score)
    assert found.after == pytest.approx(best / float(score.double().sum()), rel=1e-6)


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_every_set_keeps_its_channels_and_never_keeps_less(
    sets: int, rows: int, groups: int, seed: int
) -> None:
    score = scores(sets, rows, 4 * groups, seed)
    found = search_order(score, seed)
    whole = torch.arange(4 * groups).expand(sets, -1)
    assert torch.equal(found.order.sort(1).values, whole)
    assert found.before == retained(score)
    assert found.after == retained(reordered(score, found.order))
    assert found.after >= found.before - 1e-6
    assert torch.equal(search_order(score, seed).order, found.order)


def test_where_no_order_is_better_the_order_is_the_old_one() -> None:
    for score in (torch.ones(2, 3, 16), torch.zeros(1, 3, 8)):
        assert torch.equal(search_order(score).order[0], torch.arange(score.shape[2]))
    assert search_order(torch.zeros(1, 3, 8)).after == 1.0


def test_weights_that_can_be_24_in_another_order_lose_nothing() -> None:
    """Two channels of every four are worth nothing, all of them in the same groups."""
    score = torch.ones(1, 5, 64)
    score[:, :, :32] = 0
    found = search_order(score)
    assert found.before == 0.5
    assert found.after == 1.0


def test_channels_that_leave_a_rest_are_refused() -> None:
    with pytest.raises(ValueError, match="6 channels do not divide into groups of 4"):
        search_order(torch.ones(1, 2, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 255, 256, 1000])
def test_the_kernel_keeps_what_single_operations_keep(rows: int) -> None:
    from prox24_deploy.pruning.permute_search_cuda import kept_cuda

    generator = torch.Generator().manual_seed(rows)
    # Whole numbers, whose sums are exact in any order.
    flat = torch.randint(100, (64, rows), generator=generator).float()
    paired = torch.randperm(64, generator=generator).view(8, 8)
    splits = torch.tensor([one + other for one, other in permute_search._SPLITS])
    found = kept_cuda(flat.cuda(), paired.cuda(), splits.cuda())
    assert torch.equal(found.cpu(), kept(flat, paired))
