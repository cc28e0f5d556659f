"""Magnitude, Wanda and SparseGPT against their definitions."""

import pytest
import torch
from layers import correlated_layer
from oracles import optimal_brain_surgeon

from prox24_deploy.pruning.solvers.baselines import magnitude_mask, sparsegpt, wanda_mask
from prox24_deploy.pruning.solvers.problem import layer_problem
from prox24_deploy.sparsity.pattern import is_24, mask_24


def test_magnitude_looks_at_the_weights_alone() -> None:
    layer = correlated_layer()
    assert torch.equal(magnitude_mask(layer.problem()), mask_24(layer.weight.abs()))


def test_wanda_weighs_by_the_norm_of_the_inputs() -> None:
    layer = correlated_layer()
    score = layer.weight.abs() * layer.inputs.norm(dim=0)
    assert torch.equal(wanda_mask(layer.problem()), mask_24(score))
    assert not torch.equal(wanda_mask(layer.problem()), magnitude_mask(layer.problem()))


@pytest.mark.parametrize("features", [16, 136])
def test_sparsegpt_is_the_column_by_column_brain_surgeon(features: int) -> None:
    """136 columns cross the border of the lazily updated block of 128."""
    problem = correlated_layer(rows=5, features=features, seed=3).problem(damping=0.1)
    weight, mask = sparsegpt(problem)
    expected = optimal_brain_surgeon(problem.start, problem.curvature, mask_24)
    assert torch.equal(weight != 0, expected != 0)
    assert torch.allclose(weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(mask, mask & (weight != 0))
    assert is_24(weight)


def test_sparsegpt_on_independent_inputs_is_magnitude() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    problem = layer_problem(weight, torch.eye(32), 0.01)
    pruned, mask = sparsegpt(problem)
    assert torch.equal(mask, mask_24(weight.abs()))
    assert torch.allclose(pruned, weight.masked_fill(~mask, 0.0), atol=1e-6)


def test_sparsegpt_starts_from_the_minimiser_of_an_asymmetric_target() -> None:
    layer = correlated_layer(rows=4, features=16)
    shift = layer.inputs + 0.1 * layer.held_out
    gram, cross = shift.T @ shift, layer.inputs.T @ shift
    problem = layer_problem(layer.weight, gram, 0.05, cross)
    free = torch.linalg.solve(problem.curvature, problem.linear.T).T
    expected = optimal_brain_surgeon(free, problem.curvature, mask_24)
    weight, _ = sparsegpt(problem)
    assert torch.allclose(weight.double(), expected, rtol=1e-3, atol=1e-3)
