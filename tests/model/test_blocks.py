"""Blocks run one at a time give what the whole model gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from opened import Opened, open_tiny
from torch import nn

from prox24_deploy.core.errors import ModelDirError, RecipeError
from prox24_deploy.model.blocks import (
    find_blocks,
    layer_input,
    real_rows,
    record_calls,
    require_runs,
    run_block,
    run_model,
    shared_inputs,
    target_layers,
)


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_llama"])
def opened(request: pytest.FixtureRequest, prose: Path) -> Opened:
    return open_tiny(request.getfixturevalue(request.param), prose)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_running_the_blocks_in_turn_reproduces_the_model(opened: Opened) -> None:
    model, task = opened.model, opened.recipe.task
    blocks = find_blocks(model, opened.recipe)
    batch = opened.batches[0]
    hidden, calls = record_calls(model, blocks, batch, task)
    assert len(calls) == len(blocks) == 2
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(hidden, states[0])
    second = run_block(blocks[0], calls[0], hidden)
    assert torch.equal(second[batch.real], states[1][batch.real])
    last = run_block(blocks[1], calls[1], second)
    if task == "feature-extraction":
        assert torch.equal(last[batch.real], states[2][batch.real])
    assert hooks(model) == 0


@torch.no_grad()
def test_the_input_of_a_layer_is_what_reaches_it(opened: Opened) -> None:
    blocks = find_blocks(opened.model, opened.recipe)
    batch = opened.batches[-1]
    hidden, calls = record_calls(opened.model, blocks, batch, opened.recipe.task)
    for name, layer in target_layers(blocks[0], opened.recipe).items():
        seen: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0]))
        run_model(opened.model, batch, opened.recipe.task)
        handle.remove()
        assert torch.equal(layer_input(blocks[0], calls[0], hidden, layer), seen[0]), name
    assert hooks(opened.model) == 0


@torch.no_grad()
def test_layers_that_share_an_input_are_one_group(opened: Opened) -> None:
    blocks = find_blocks(opened.model, opened.recipe)
    hidden, calls = record_calls(opened.model, blocks, opened.batches[0], opened.recipe.task)
    layers = target_layers(blocks[0], opened.recipe)
    groups = shared_inputs(blocks[0], layers, calls[0], hidden)
    expected = {
        "bert": [
            ["attention.self.query", "attention.self.key", "attention.self.value"],
            ["attention.output.dense"], ["intermediate.dense"], ["output.dense"],
        ],
        "llama": [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"],
        ],
    }  # fmt: skip
    assert groups == expected[opened.recipe.family]
    assert hooks(opened.model) == 0


@torch.no_grad()
def test_hooks_are_removed_when_a_model_fails(opened: Opened) -> None:
    blocks = find_blocks(opened.model, opened.recipe)
    batch = opened.batches[0]
    bad = type(batch)(dict(batch.inputs, input_ids=batch.inputs["input_ids"] + 10_000), batch.real)
    with pytest.raises(IndexError):
        record_calls(opened.model, blocks, bad, opened.recipe.task)
    assert hooks(opened.model) == 0


def test_a_recipe_that_names_no_blocks_is_refused(opened: Opened) -> None:
    wrong = opened.recipe.model_copy(update={"blocks": "decoder.layers"})
    with pytest.raises(RecipeError, match=r"'decoder.layers', which .* does not have"):
        find_blocks(opened.model, wrong)
    one = opened.recipe.model_copy(update={"blocks": f"{opened.recipe.blocks}.0"})
    with pytest.raises(RecipeError, match="expected a ModuleList"):
        find_blocks(opened.model, one)


def test_targets_follow_the_globs_of_the_recipe(opened: Opened) -> None:
    block = find_blocks(opened.model, opened.recipe)[0]
    everything = opened.recipe.model_copy(update={"targets": ["*"]})
    names = set(target_layers(block, everything))
    assert names == set(target_layers(block, opened.recipe))
    some = everything.model_copy(update={"ignore": ["*attn*", "attention.*"]})
    assert 2 <= len(target_layers(block, some)) < len(names)
    wrong = opened.recipe.model_copy(update={"targets": ["mlp.nothing"]})
    with pytest.raises(RecipeError, match=r"'mlp.nothing' matches no linear layer"):
        target_layers(block, wrong)


def test_padding_is_left_out_of_the_rows() -> None:
    tensor = torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[True, True, False], [True, False, False]])
    assert real_rows(tensor, real).tolist() == [[0, 1], [2, 3], [6, 7]]
    with pytest.raises(RecipeError, match=r"shape \(2, 6, 1\), expected \(2, 3\) positions"):
        real_rows(tensor.reshape(2, 6, 1), real)


def test_samples_that_the_model_does_not_take_are_refused_before_any_work(opened: Opened) -> None:
    batch, path = opened.batches[0], Path("some/model")
    require_runs(opened.model, batch, opened.recipe.task, path)
    ids = batch.inputs["input_ids"]
    beyond = replace(batch, inputs=batch.inputs | {"input_ids": torch.full_like(ids, 10_000)})
    message = (
        r"^Model directory some/model opens but does not run on its samples, input_ids \(.*\); "
    )
    with pytest.raises(ModelDirError, match=message):
        require_runs(opened.model, beyond, opened.recipe.task, path)
