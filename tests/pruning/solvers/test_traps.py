"""Numerical traps of layer pruning that end in wrong or non-finite weights without any error."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from layers import correlated_layer
from torch import Tensor

from prox24_deploy.core.types import Method, Refinement
from prox24_deploy.pruning.solvers import admm_step as step_module
from prox24_deploy.pruning.solvers import ista as ista_module
from prox24_deploy.pruning.solvers.admm import AdmmOptions, prox_admm
from prox24_deploy.pruning.solvers.ista import IstaOptions, ista
from prox24_deploy.pruning.solvers.problem import LayerProblem, layer_problem
from prox24_deploy.pruning.solvers.prox import prox_24
from prox24_deploy.pruning.solvers.refine import masked_conjugate_gradient, masked_gradient
from prox24_deploy.pruning.solvers.solver import PRESETS, solve_layer
from prox24_deploy.sparsity.pattern import final_mask, is_24, mask_24

METHODS: tuple[Method, ...] = get_args(Method)


def marks(mask: Tensor) -> set[int]:
    """How many marks the groups of a mask have."""
    return set(mask.unflatten(-1, (-1, 4)).sum(-1).flatten().tolist())


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["prox", "ista"])
def test_no_row_is_given_a_lambda_that_is_not_finite(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ is in units of 1 / mean |row|, which a row of zeros does not have: ∞ · 0 is NaN."""
    given: list[Tensor] = []

    def watched(weight: Tensor, lam: Tensor, **rest: int) -> Tensor:
        given.append(lam)
        return prox_24(weight, lam, **rest)

    for module in (step_module, ista_module):
        monkeypatch.setattr(module, "prox_24", watched)
    layer = correlated_layer(rows=4, features=16)
    layer.weight[1] = 0.0
    solution = solve_layer(layer.weight, layer.problem(), method=method)
    assert given
    assert bool(torch.isfinite(torch.stack(given)).all())
    assert solution.weight[1].tolist() == [0.0] * 16


@pytest.mark.parametrize("method", METHODS)
def test_a_feature_whose_square_underflows_gets_weight_zero(method: Method) -> None:
    """Its H_jj is 0 in float32 and its H_ij is not, so it is dead but still coupled to others."""
    layer = correlated_layer(rows=8, features=32)
    faint = [4, 5, 6]
    layer.inputs[:, faint] = 1e-25
    assert layer.gram.diagonal()[faint].tolist() == [0.0] * 3
    assert bool((layer.gram[:4, faint] != 0).all())
    solution = solve_layer(layer.weight, layer.problem(), method=method)
    # Three of four features of a group are faint: one of them at least is kept, and still zero.
    assert bool(solution.mask[:, faint].any(1).all())
    assert bool((solution.weight[:, faint] == 0).all())
    assert bool((solution.weight != 0).any(1).all())


def test_a_dead_feature_stays_zero_in_the_minimiser_of_an_asymmetric_target() -> None:
    layer = correlated_layer(rows=4, features=16)
    layer.inputs[:, 5] = 1e-25
    tokens = len(layer.inputs)
    cross = layer.held_out.T @ layer.inputs / tokens
    assert bool((cross[:, 5] != 0).all())
    problem = layer_problem(layer.weight, layer.gram, 0.01, cross)
    assert problem.linear[:, 5].tolist() == [0.0] * 4


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_has_two_marks_a_group_whatever_the_weights_are(method: Method) -> None:
    """Zeros of the dense weights may be kept, so a mask cannot be read off the result."""
    layer = correlated_layer(rows=6, features=32)
    layer.weight[:, :8] = 0.0
    layer.weight[2] = 0.0
    layer.inputs[:, 8:16] = 0.0
    solution = solve_layer(layer.weight, layer.problem(), method=method)
    assert solution.used != "unchanged"
    assert marks(solution.mask) == {2}
    assert bool((solution.weight[solution.mask] == 0).any())
    assert bool((solution.weight[~solution.mask] == 0).all())


def test_the_mask_of_weights_sparser_than_24_has_two_marks_a_group() -> None:
    layer = correlated_layer(rows=3, features=16)
    layer.weight[:, torch.arange(16) % 4 != 1] = 0.0
    solution = solve_layer(layer.weight, layer.problem())
    assert solution.used == "unchanged"
    assert marks(solution.mask) == {2}
    assert bool(solution.mask[solution.weight != 0].all())


def test_a_settled_mask_keeps_non_zeros_first_and_fills_up_by_the_fallback() -> None:
    """Against sorting each group; the sum of the two sizes would be the fallback in float32."""
    iterate = 1e-12 * gaussian(20, 16) * (gaussian(20, 16, seed=1) > -0.3)
    fallback = gaussian(20, 16, seed=2)
    mask = final_mask(iterate, fallback)
    for row in range(20):
        for start in range(0, 16, 4):
            size, filler = (
                part[row, start : start + 4].abs().tolist() for part in (iterate, fallback)
            )
            order = sorted(range(4), key=lambda i: (size[i], filler[i]), reverse=True)
            kept = {i for i in range(4) if mask[row, start + i]}
            assert kept == set(order[:2])


@pytest.mark.parametrize("refinement", ["none", "gradient", "conjugate-gradient"])
@pytest.mark.parametrize("method", METHODS)
def test_masked_negative_weights_are_positive_zeros(method: Method, refinement: Refinement) -> None:
    """A cap of three steps leaves most weights to be masked instead of made zero by the prox."""
    layer = correlated_layer(rows=4, features=16)
    layer.weight[:] = -layer.weight.abs()
    solution = solve_layer(
        layer.weight,
        layer.problem(),
        method=method,
        options=replace(PRESETS["fast"], max_iterations=3),
        ista_options=IstaOptions(max_iterations=3),
        refinement=refinement,
    )
    masked = solution.weight[~solution.mask]
    assert masked.tolist() == [0.0] * 32
    assert not bool(torch.signbit(masked).any())


@pytest.mark.parametrize("refine", [masked_conjugate_gradient, masked_gradient])
def test_a_refinement_ignores_masked_elements_of_its_start(
    refine: Callable[[LayerProblem, Tensor, Tensor], Tensor],
) -> None:
    problem = correlated_layer(rows=4, features=16).problem()
    mask = mask_24(problem.start.abs())
    kept = problem.start.masked_fill(~mask, 0.0)
    first = refine(problem, mask, kept)
    assert torch.equal(first, refine(problem, mask, kept.masked_fill(~mask, -5.0)))
    assert not bool(torch.signbit(refine(problem, mask, -problem.start.abs())[~mask]).any())


def test_refining_what_is_refined_makes_no_row_worse() -> None:
    """At the minimum every further step is rounding error, which may lead up as well as down."""
    problem = correlated_layer(rows=64, features=32).problem()
    mask = mask_24(problem.start.abs())
    once = masked_conjugate_gradient(problem, mask, problem.start, iterations=100)
    twice = masked_conjugate_gradient(problem, mask, once, tolerance=0.0)
    assert bool((problem.loss(twice) <= problem.loss(once)).all())


def with_a_straggler() -> Tensor:
    """128 groups, one of which is so small that no λ of a schedule decides it."""
    weight = gaussian(16, 32)
    weight[3, 8:12] *= 1e-12
    return weight


def test_a_straggler_does_not_hold_up_the_other_groups() -> None:
    options = replace(PRESETS["fast"], unconverged_fraction=0.01)
    steps = [
        prox_admm(layer_problem(weight, torch.eye(32), 0.01), options)[2]
        for weight in (with_a_straggler(), gaussian(16, 32))
    ]
    assert steps[0] == steps[1] < options.max_iterations


@pytest.mark.parametrize(
    "run",
    [
        lambda problem: prox_admm(
            problem,
            AdmmOptions(
                start=0.05,
                growth=1.2,
                rho=1.0,
                max_iterations=40,
                check_every=5,
                unconverged_fraction=0.0,
            ),
        ),
        lambda problem: ista(problem, IstaOptions(start=0.05, growth=1.2, max_iterations=40)),
    ],
    ids=["prox", "ista"],
)
def test_a_straggler_is_projected_at_the_cap(
    run: Callable[[LayerProblem], tuple[Tensor, Tensor, int]],
) -> None:
    weight = with_a_straggler()
    result, mask, iterations = run(layer_problem(weight, torch.eye(32), 0.01))
    assert iterations == 40
    assert is_24(result)
    assert marks(mask) == {2}
    assert torch.equal(mask[3, 8:12], mask_24(weight[3, 8:12].abs()))
