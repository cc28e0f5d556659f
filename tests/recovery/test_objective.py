"""The loss between two models: zero for the same, its gradient, and what it must not see."""

from copy import deepcopy

import pytest
import torch
from family_batches import batch, recipe_of
from tiny_families import FAMILIES, tiny_model

from prox24_deploy.model.batch import Batch
from prox24_deploy.recovery.objective import divergences, loss_name, objective_for

# One of each way to read and to answer.
ROWS = [
    "llama", "bart", "whisper", "bert", "qwen3, sentences", "bert, text classes",
    "bert, token classes", "clip, text tower", "clip, image tower", "vit", "vit, classes",
    "resnet, classes", "convnext, classes", "t5, encoder",
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_it_is_zero_for_the_same_model_and_leads_back_to_it(row: str) -> None:
    assert row in FAMILIES
    dense = tiny_model(row).requires_grad_(requires_grad=False)
    recipe = recipe_of(dense)
    objective, read = objective_for(recipe.task), batch(recipe)
    assert float(objective(dense, dense, read)[0]) == pytest.approx(0, abs=1e-4)
    sparse = deepcopy(dense)
    weights = [p for p in sparse.parameters() if p.ndim > 1]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=generator))
        weight.requires_grad = True
    loss, count = objective(dense, sparse, read)
    assert count > 0
    away = float(loss.detach())
    assert away > 1e-3
    loss.backward()
    moved = [weight for weight in weights if weight.grad is not None]
    assert moved
    with torch.no_grad():
        # A small step down the gradient comes nearer.
        pairs = [(weight, weight.grad) for weight in moved if weight.grad is not None]
        size = sum(float(gradient.square().sum()) for _, gradient in pairs)
        for weight, gradient in pairs:
            weight.sub_(0.05 * away / size * gradient)
        assert float(objective(dense, sparse, read)[0]) < away


def test_padding_does_not_count() -> None:
    dense, sparse = tiny_model("bert, token classes"), tiny_model("bert, token classes")
    recipe = recipe_of(dense)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.mul_(1.1)
    objective, read = objective_for(recipe.task), batch(recipe)
    other = read.inputs["input_ids"].clone()
    other[~read.real] = 9
    changed = Batch({**read.inputs, "input_ids": other}, read.real)
    with torch.no_grad():
        first, second = (objective(dense, sparse, each) for each in (read, changed))
    assert first[1] == second[1] == int(read.real.sum())
    torch.testing.assert_close(first[0], second[0])


def test_a_single_score_is_held_to_its_value() -> None:
    dense, sparse = (tiny_model("bert, text classes", num_labels=1) for _ in range(2))
    recipe = recipe_of(dense)
    with torch.no_grad():
        bias = sparse.classifier.bias  # type: ignore[union-attr]
        bias.add_(0.5)  # type: ignore[operator]
        loss, count = objective_for(recipe.task)(dense, sparse, batch(recipe))
    assert count == 3
    assert float(loss) == pytest.approx(3 * 0.25, rel=1e-4)
    config = dense.config.to_dict()  # type: ignore[operator, union-attr]
    assert loss_name(recipe.task, config) == "squared difference of scores"
    assert loss_name(recipe.task, {"id2label": {"0": "a", "1": "b"}}) == "KL(dense, sparse)"


def test_divergence_of_the_likeliest_is_a_lower_bound_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    expected, given = (3 * torch.randn(50, 40, generator=generator) for _ in range(2))
    whole = divergences(expected, given)
    own = torch.distributions.Categorical(logits=expected)
    other = torch.distributions.Categorical(logits=given)
    torch.testing.assert_close(whole, torch.distributions.kl_divergence(own, other))
    torch.testing.assert_close(divergences(expected, given, 40), whole)
    torch.testing.assert_close(divergences(expected, given, 39), whole)
    for top_k in (1, 5, 20):
        part = divergences(expected, given, top_k)
        assert bool((part <= whole + 1e-5).all())
        assert bool((part >= -1e-6).all())
        assert bool((part < whole).any())
