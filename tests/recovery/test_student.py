"""What of a pruned model is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opened import Opened, open_tiny

from prox24_deploy.core.errors import SparsityLostError
from prox24_deploy.model.layers import layer_at
from prox24_deploy.pruning.selection import target_paths
from prox24_deploy.recovery.optimizer import make_optimizer, set_rates
from prox24_deploy.recovery.student import find_trained, put, values_of
from prox24_deploy.sparsity.pattern import project_24


@pytest.fixture
def opened(tiny_llama: Path, prose: Path) -> Opened:
    """A tiny model, every target of it 2:4."""
    found = open_tiny(tiny_llama, prose, tokens=1024)
    for path in target_paths(found.recipe, found.model):
        layer = layer_at(found.model, path)
        layer.weight.copy_(project_24(layer.weight))
    return found


def test_layers_norms_and_biases_but_no_embedding(opened: Opened) -> None:
    trained = find_trained(opened.model, opened.directory, opened.recipe)
    names = {name for each in trained for name in each.names}
    layers = {f"{path}.weight" for path in target_paths(opened.recipe, opened.model)}
    norms = {name for name, p in opened.model.named_parameters() if p.ndim == 1}
    assert names == layers | norms
    assert {each.dtype for each in trained} == {torch.float16}
    # The output layer has the weight of the embedding.
    assert "lm_head.weight" not in names
    for each in trained:
        assert (each.axis == 1) == (each.zeros is not None)
        assert each.free == int((each.parameter != 0).sum())


def test_a_zero_beyond_the_pattern_stays_a_zero(opened: Opened) -> None:
    path = target_paths(opened.recipe, opened.model)[0]
    layer_at(opened.model, path).weight[0, :4] = 0
    first = find_trained(opened.model, opened.directory, opened.recipe)[0]
    gradient = torch.ones_like(first.parameter)
    first.clear(gradient)
    assert not gradient[0, :4].any()
    assert torch.equal(gradient == 0, first.parameter == 0)


def test_a_norm_that_two_modules_share_has_both_names(opened: Opened) -> None:
    blocks = opened.model.model.layers  # type: ignore[union-attr]
    blocks[1].input_layernorm.weight = blocks[0].input_layernorm.weight  # type: ignore[index, union-attr]
    trained = find_trained(opened.model, opened.directory, opened.recipe)
    shared = [each.names for each in trained if len(each.names) > 1]
    assert shared == [
        ("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight")
    ]


def test_a_target_with_the_weight_of_another_module_is_left(opened: Opened) -> None:
    """It would change what else is made of it."""
    blocks = opened.model.model.layers  # type: ignore[union-attr]
    blocks[1].self_attn.q_proj.weight = blocks[0].self_attn.q_proj.weight  # type: ignore[index, union-attr]
    trained = find_trained(opened.model, opened.directory, opened.recipe)
    assert not any("q_proj" in name for each in trained for name in each.names)


def test_the_first_layer_that_is_not_sparse_is_named(opened: Opened) -> None:
    layer_at(opened.model, "model.layers.1.mlp.up_proj").weight.fill_(1)
    with pytest.raises(SparsityLostError, match=r"Layer model.layers.1.mlp.up_proj of .* \(0, 0\)"):
        find_trained(opened.model, opened.directory, opened.recipe)


def test_values_are_put_back_as_they_were_or_as_they_are_stored(opened: Opened) -> None:
    trained = find_trained(opened.model, opened.directory, opened.recipe)
    first = values_of(trained)
    put(trained, [value + 1e-6 for value in first])
    assert not torch.equal(trained[0].parameter, first[0])
    put(trained, values_of(trained), rounded=True)
    assert torch.equal(trained[0].parameter.half().float(), trained[0].parameter)
    put(trained, first)
    assert all(torch.equal(e.parameter, v) for e, v in zip(trained, first, strict=True))


def test_norms_with_small_weights_move_by_less(opened: Opened) -> None:
    def scales() -> dict[str, float]:
        found = find_trained(opened.model, opened.directory, opened.recipe)
        return {each.names[0]: each.scale for each in found}

    before = scales()
    name = next(name for name in before if name.endswith("norm.weight"))
    opened.model.get_parameter(name).fill_(1e-3)
    after = scales()
    assert after[name] == pytest.approx(1e-3 / 16)
    assert after[name] < before[name]
    assert {n: s for n, s in after.items() if n != name} == {
        n: s for n, s in before.items() if n != name
    }


def test_parameters_of_about_one_scale_share_a_group(opened: Opened) -> None:
    trained = find_trained(opened.model, opened.directory, opened.recipe)
    adam = make_optimizer("adamw", trained)
    assert len(adam.param_groups) < len(trained) / 2
    set_rates(adam, trained, 0.5)
    rates = {id(p): group["lr"] for group in adam.param_groups for p in group["params"]}
    assert len(rates) == len(trained)
    for each in trained:
        assert rates[id(each.parameter)] == pytest.approx(0.5 * each.scale, rel=0.1)
    still = replace(trained[0], scale=0.0)
    set_rates(adam := make_optimizer("adamw", [still]), [still], 0.5)
    assert adam.param_groups[0]["lr"] == 0.0
