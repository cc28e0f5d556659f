"""The normalised quadratic against the loss written out."""

import pytest
import torch
from layers import correlated_layer

from prox24_deploy.pruning.solvers.problem import damping_for, layer_problem


@pytest.mark.parametrize("asymmetric", [False, True])
def test_differences_of_the_loss_are_those_of_the_formula(*, asymmetric: bool) -> None:
    layer = correlated_layer(rows=6, features=16)
    pruned_inputs = layer.inputs.double()
    dense_inputs = layer.held_out.double() if asymmetric else pruned_inputs
    tokens, delta = len(pruned_inputs), 0.2
    gram = pruned_inputs.T @ pruned_inputs / tokens
    cross = dense_inputs.T @ pruned_inputs / tokens if asymmetric else None
    problem = layer_problem(layer.weight, gram, delta, cross)
    scale = gram.diagonal().sqrt()
    start = layer.weight.double()

    def explicit(weight: torch.Tensor) -> torch.Tensor:
        output = (dense_inputs @ start.T - pruned_inputs @ weight.T).square().sum(0)
        pull = ((weight - start) * scale).square().sum(1)
        return 0.5 * output / tokens + 0.5 * delta * pull

    first, second = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).double()
    expected = explicit(first) - explicit(second)
    found = problem.loss((first * scale).float()) - problem.loss((second * scale).float())
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    assert torch.allclose(problem.to_weight(problem.start), layer.weight, rtol=1e-6)


def test_the_dense_weights_minimise_the_symmetric_loss() -> None:
    layer = correlated_layer(rows=4, features=16)
    problem = layer.problem()
    best = problem.loss(problem.start)
    for seed in range(5):
        noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
        assert bool((problem.loss(problem.start + 0.1 * noise) > best).all())


def test_the_scale_of_the_gram_matrix_does_not_matter() -> None:
    layer = correlated_layer(rows=4, features=16)
    first, second = layer.problem(), layer_problem(layer.weight, layer.gram * 1e6, 0.01)
    assert torch.allclose(first.curvature, second.curvature, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.curvature.diagonal() > 1.0, torch.ones(16, dtype=torch.bool))


def test_a_dead_feature_is_marked_and_pulls_nothing() -> None:
    layer = correlated_layer(rows=4, features=16)
    layer.inputs[:, 5] = 0.0
    problem = layer.problem()
    assert problem.dead.nonzero().flatten().tolist() == [5]
    assert problem.start[:, 5].tolist() == [0.0] * 4
    assert problem.linear[:, 5].tolist() == [0.0] * 4
    assert float(problem.scale[5]) == 1.0
    assert bool(torch.isfinite(problem.curvature).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["weight", "gram", "cross gram"])
def test_a_value_that_is_not_finite_is_refused_by_name(which: str, value: float) -> None:
    parts = {"weight": torch.ones(2, 4), "gram": torch.eye(4), "cross gram": torch.eye(4)}
    parts[which][1, 2] = value
    with pytest.raises(ValueError, match=f"the {which} matrix holds NaN or infinity"):
        layer_problem(parts["weight"], parts["gram"], 0.1, parts["cross gram"])


def test_a_negative_diagonal_is_refused() -> None:
    with pytest.raises(ValueError, match="negative diagonal"):
        layer_problem(torch.ones(2, 4), -torch.eye(4), 0.1)


@pytest.mark.parametrize(
    ("features", "tokens", "expected"),
    [(100, 1000, 0.04), (100, 100_000, 0.01), (4096, 1000, 0.3), (4, 0, 0.3)],
)
def test_damping_grows_with_features_per_token_within_its_limits(
    features: int, tokens: int, expected: float
) -> None:
    assert damping_for(features, tokens) == pytest.approx(expected)
