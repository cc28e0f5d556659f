"""The literal method of the paper: its limits, its options, and its masked gradient steps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from layers import correlated_layer

from prox24_deploy.core.types import Method, Refinement
from prox24_deploy.pruning.solvers.baselines import magnitude_mask, sparsegpt, wanda_mask
from prox24_deploy.pruning.solvers.ista import IstaOptions, ista
from prox24_deploy.pruning.solvers.problem import LayerProblem
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient, masked_gradient
from prox24_deploy.pruning.solvers.solver import solve_layer


def refined_loss(problem: LayerProblem, mask: torch.Tensor) -> float:
    """Loss of the best weights on a mask, above that of the unpruned minimiser."""
    best = masked_conjugate_gradient(problem, mask, problem.start, iterations=200)
    dense = torch.linalg.solve(problem.curvature, problem.linear.T).T
    return float((problem.loss(best) - problem.loss(dense)).sum())


def test_it_ends_with_24_weights_before_its_cap() -> None:
    problem = correlated_layer().problem()
    options = IstaOptions()
    weight, mask, iterations = ista(problem, options)
    assert iterations < options.max_iterations
    assert bool((mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    assert bool((weight[~mask] == 0).all())


def test_a_cap_that_is_too_low_projects_what_is_left() -> None:
    problem = correlated_layer(rows=8, features=32).problem()
    weight, mask, iterations = ista(problem, IstaOptions(max_iterations=3))
    assert iterations == 3
    assert bool((mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all())
    assert bool((weight != 0).any())


def test_its_preconditioned_mask_beats_magnitude_and_wanda_after_equal_refinement() -> None:
    """In units of the weights, features of very different scale defeat it; that is why the
    solver of this project normalises."""
    ratios = []
    for seed in range(4):
        problem = correlated_layer(rows=24, seed=seed).problem()
        own = refined_loss(problem, ista(problem, IstaOptions(precondition=True))[1])
        rivals = [refined_loss(problem, mask(problem)) for mask in (magnitude_mask, wanda_mask)]
        ratios.append(own / min(rivals))
    assert max(ratios) < 0.97


def test_preconditioning_and_momentum_find_better_masks() -> None:
    logs = {"plain": 0.0, "preconditioned": 0.0, "both": 0.0}
    for seed in range(4):
        problem = correlated_layer(rows=24, seed=seed).problem()
        for name, options in {
            "plain": IstaOptions(),
            "preconditioned": IstaOptions(precondition=True),
            "both": IstaOptions(precondition=True, momentum=0.9),
        }.items():
            logs[name] += math.log(refined_loss(problem, ista(problem, options)[1]))
    assert logs["both"] < logs["preconditioned"] < logs["plain"]


def test_the_unscaled_problem_is_the_same_up_to_one_factor() -> None:
    problem = correlated_layer(rows=6, features=16).problem()
    plain = problem.unscaled()
    first, second = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    difference = problem.loss(first) - problem.loss(second)
    own = plain.loss(first / problem.scale) - plain.loss(second / problem.scale)
    factor = difference / own
    assert torch.allclose(factor, factor.mean().expand(6), rtol=1e-3)
    assert float(plain.curvature.diagonal().mean()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("precondition", [False, True])
def test_masked_gradient_never_raises_the_loss_and_nears_the_optimum(*, precondition: bool) -> None:
    problem = correlated_layer(rows=8, features=32).problem()
    start, mask = sparsegpt(problem)
    optimum = problem.loss(masked_conjugate_gradient(problem, mask, start, iterations=500))
    losses = [problem.loss(start)]
    for iterations in (1, 10, 100, 1000):
        x = masked_gradient(problem, mask, start, iterations=iterations, precondition=precondition)
        assert bool((x[~mask] == 0).all())
        losses.append(problem.loss(x))
    assert bool((losses[1] < losses[0]).all())
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before + 1e-5 * before.abs()).all())
    left = (losses[-1] - optimum).sum() / (losses[0] - optimum).sum()
    assert -1e-3 < float(left) < 0.15


def test_every_refinement_is_usable_on_any_mask() -> None:
    layer = correlated_layer(rows=16, features=32)
    problem = layer.problem()
    methods: tuple[Method, ...] = ("ista", "sparsegpt", "wanda", "magnitude")
    kinds: tuple[Refinement, ...] = ("none", "gradient", "conjugate-gradient")
    for method in methods:
        loss = {
            kind: float(
                problem.loss(
                    solve_layer(layer.weight, problem, method=method, refinement=kind).weight
                    * problem.scale
                ).sum()
            )
            for kind in kinds
        }
        assert loss["conjugate-gradient"] <= loss["gradient"] < loss["none"], method


def test_auto_refines_ista_by_gradient_and_the_rest_by_conjugate_gradients() -> None:
    layer = correlated_layer(rows=8, features=32)
    expected: dict[Method, Refinement] = {"ista": "gradient", "wanda": "conjugate-gradient"}
    for method, kind in expected.items():
        choices: tuple[Refinement, ...] = ("auto", kind)
        automatic, named = (
            solve_layer(layer.weight, layer.problem(), method=method, refinement=refinement)
            for refinement in choices
        )
        assert torch.equal(automatic.weight, named.weight)


def test_dead_features_and_zero_rows_stay_finite() -> None:
    layer = correlated_layer(rows=8, features=32)
    layer.inputs[:, 4:8] = 0.0
    layer.weight[3] = 0.0
    for momentum in (0.0, 0.9):
        options = replace(IstaOptions(), momentum=momentum)
        weight, _, _ = ista(layer.problem(), options)
        assert bool(torch.isfinite(weight).all())
        assert bool((weight[3] == 0).all())
