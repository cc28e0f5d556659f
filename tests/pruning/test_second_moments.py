import math

import pytest
import torch
from torch import Tensor

from prox24_deploy.model.blocks import real_rows
from prox24_deploy.pruning.second_moments import SecondMoments

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(moments: SecondMoments, before: Tensor, after: Tensor) -> float:
    return moments.errors({"layer": before}).of("layer", after)


def test_sums_equal_float64_products_over_real_rows_of_all_batches() -> None:
    moments = SecondMoments.empty(6, CPU)
    rows: list[tuple[Tensor, Tensor]] = []
    for seed in range(3):
        dense, pruned = (gaussian(4, 5, 6, seed=2 * seed + i) for i in range(2))
        real = gaussian(4, 5, seed=100 + seed) > 0
        dense[~real] = 1e6
        pruned[~real] = -1e6
        moments.add(real_rows(dense, real), real_rows(pruned, real))
        rows += [
            (dense[i, j].double(), pruned[i, j].double())
            for i in range(4)
            for j in range(5)
            if real[i, j]
        ]
    dense_rows, pruned_rows = (torch.stack(part) for part in zip(*rows, strict=True))
    assert moments.tokens == len(rows)
    for made, left, right in (
        (moments.pruned, pruned_rows, pruned_rows),
        (moments.cross, dense_rows, pruned_rows),
        (moments.dense, dense_rows, dense_rows),
    ):
        assert made.dtype == torch.float64
        torch.testing.assert_close(made, left.T @ right, rtol=1e-6, atol=1e-5)


def test_cross_is_dense_by_pruned_and_not_the_other_way_round() -> None:
    moments = SecondMoments.empty(2, CPU)
    moments.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    assert moments.cross.tolist() == [[3.0, 5.0], [6.0, 10.0]]


def test_small_batches_are_not_lost_in_a_large_sum() -> None:
    moments = SecondMoments.empty(1, CPU)
    # In float32 2**24 + 1 is 2**24.
    large, small = torch.tensor([[4096.0]]), torch.tensor([[1.0]])
    moments.add(large, large)
    for _ in range(100):
        moments.add(small, small)
    for total in (moments.pruned, moments.cross, moments.dense):
        assert total.item() == 2**24 + 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_upcast_before_they_are_squared(dtype: torch.dtype) -> None:
    rows = torch.tensor([[300.0, 1.0], [2.0, 257.0]], dtype=dtype)
    exact = rows.double().T @ rows.double()
    # 300 squared overflows float16 and needs more bits than bfloat16 has.
    assert not torch.equal((rows.T @ rows).double(), exact)
    moments = SecondMoments.empty(2, CPU)
    moments.add(rows, rows)
    for total in (moments.pruned, moments.cross, moments.dense):
        assert torch.equal(total, exact)


def test_relative_error_equals_the_explicit_ratio_of_output_energies() -> None:
    dense = gaussian(50, 8, seed=0)
    pruned = dense + 0.1 * gaussian(50, 8, seed=1)
    before = gaussian(5, 8, seed=2)
    after = before * (gaussian(5, 8, seed=3) > 0)
    moments = SecondMoments.empty(8, CPU)
    moments.add(dense[:20], pruned[:20])
    moments.add(dense[20:], pruned[20:])
    wanted = dense.double() @ before.double().T
    got = pruned.double() @ after.double().T
    explicit = float((wanted - got).square().sum() / wanted.square().sum())
    assert 0.1 < explicit < 2
    assert math.isclose(error(moments, before, after), explicit, rel_tol=1e-5)


def test_relative_error_of_half_precision_weights_is_computed_in_float64() -> None:
    # Small whole numbers, of which float32 rounds no product and no sum.
    rows = (8 * gaussian(40, 4, seed=4)).round()
    before = torch.tensor([[300.0, 1.0, -2.0, 0.5]])
    after = torch.tensor([[300.0, 1.0, -2.0, 0.0]]).half()
    moments = SecondMoments.empty(4, CPU)
    moments.add(rows, rows)
    difference = rows.double() @ (before.double() - after.double()).T
    wanted = rows.double() @ before.double().T
    explicit = float(difference.square().sum() / wanted.square().sum())
    assert math.isclose(error(moments, before, after), explicit, rel_tol=1e-3)


def test_relative_error_of_unchanged_weights_is_never_negative() -> None:
    for seed in range(20):
        rows, weight = gaussian(30, 12, seed=seed), gaussian(7, 12, seed=seed + 50)
        moments = SecondMoments.empty(12, CPU)
        # Inputs that differ in their last bit: rounding alone decides the sign of the sum.
        moments.add(rows, rows * (1 + 1e-7))
        assert 0 <= error(moments, weight, weight) < 1e-6


def test_relative_error_is_zero_where_the_dense_layer_outputs_nothing() -> None:
    rows = gaussian(10, 4, seed=5)
    moments = SecondMoments.empty(4, CPU)
    moments.add(torch.zeros_like(rows), rows)
    assert error(moments, gaussian(3, 4, seed=6), gaussian(3, 4, seed=7)) == 0.0
    moments.add(rows, rows)
    assert error(moments, torch.zeros(3, 4), gaussian(3, 4, seed=7)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_relative_error_of_broken_activations_is_not_a_small_number(bad: float) -> None:
    rows = gaussian(10, 4, seed=8)
    broken = rows.clone()
    broken[3, 2] = bad
    weight = gaussian(3, 4, seed=9)
    for dense, pruned in ((broken, rows), (rows, broken), (broken, broken)):
        moments = SecondMoments.empty(4, CPU)
        moments.add(dense, pruned)
        assert not math.isfinite(error(moments, weight, weight))
