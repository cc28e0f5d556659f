"""Masked conjugate gradients against dense least squares."""

import pytest
import torch
from layers import correlated_layer
from oracles import least_squares_on_mask
from torch import Tensor

from prox24_deploy.pruning.solvers.baselines import wanda_mask
from prox24_deploy.pruning.solvers.products import ExactFactor
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient
from prox24_deploy.sparsity.pattern import mask_24


def test_it_reaches_exact_least_squares() -> None:
    problem = correlated_layer().problem()
    mask = mask_24(problem.start.abs())
    found = masked_conjugate_gradient(problem, mask, problem.start, iterations=200)
    exact = least_squares_on_mask(problem.curvature, problem.linear, mask)
    floor = problem.loss(problem.start).double()
    excess = [problem.loss(w.float()).double() - floor for w in (found, exact)]
    assert torch.allclose(excess[0], excess[1], rtol=1e-3)
    assert float(excess[0].sum() / excess[1].sum()) < 1 + 1e-4


def test_no_row_gets_worse_however_few_steps_it_takes() -> None:
    problem = correlated_layer(seed=1).problem()
    mask = mask_24(problem.start.abs())
    before = problem.loss(problem.start.masked_fill(~mask, 0.0))
    for iterations in (0, 1, 2, 5, 50):
        after = masked_conjugate_gradient(problem, mask, problem.start, iterations=iterations)
        assert bool((problem.loss(after) <= before).all())
        assert bool((after[~mask] == 0).all())
        assert not bool(torch.signbit(after[~mask]).any())
        before = problem.loss(after) + 1e-3 * before.abs()


def test_a_step_that_would_make_a_row_worse_is_not_taken() -> None:
    """An indefinite curvature breaks the method's premise; the guard must hold even so."""
    layer = correlated_layer(rows=3, features=8)
    problem = layer.problem()
    problem.curvature.mul_(-1.0)
    mask = torch.ones_like(problem.start, dtype=torch.bool)
    start = torch.zeros_like(problem.start)
    result = masked_conjugate_gradient(problem, mask, start)
    assert bool((problem.loss(result) <= problem.loss(start)).all())
    assert bool(torch.isfinite(result).all())


def test_zero_rows_stay_zero_and_disturb_no_other() -> None:
    layer = correlated_layer(rows=4, features=16)
    layer.weight[2] = 0.0
    problem = layer.problem()
    mask = mask_24(problem.start.abs())
    result = masked_conjugate_gradient(problem, mask, problem.start)
    assert result[2].tolist() == [0.0] * 16
    assert bool(torch.isfinite(result).all())
    assert bool((result[[0, 1, 3]] != 0).any(1).all())


def test_a_solved_start_is_kept() -> None:
    problem = correlated_layer(rows=4, features=16).problem()
    mask = torch.ones_like(problem.start, dtype=torch.bool)
    result = masked_conjugate_gradient(problem, mask, problem.start)
    assert torch.allclose(result, problem.start, atol=1e-5)


def test_rows_that_are_done_leave_the_products_and_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = correlated_layer(rows=20, features=64, seed=5).problem()
    mask = wanda_mask(problem)
    start = problem.start.masked_fill(~mask, torch.nan)
    best = masked_conjugate_gradient(problem, mask, start, iterations=200)
    start[::2] = best[::2]
    products: list[int] = []
    after = ExactFactor.after

    def noted(factor: ExactFactor, rows: Tensor) -> Tensor:
        products.append(len(rows))
        return after(factor, rows)

    monkeypatch.setattr(ExactFactor, "after", noted)
    found = masked_conjugate_gradient(problem, mask, start, iterations=200, tolerance=1e-5)
    assert products[0] == 20
    assert products[1] == 10
    assert products[-2] < 10
    assert products[-1] == 20
    torch.testing.assert_close(problem.loss(found), problem.loss(best), rtol=1e-5, atol=0.0)
    assert torch.equal(found[::2], best[::2])
