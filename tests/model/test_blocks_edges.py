"""Blocks of unusual make, and models that fail while hooks are in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import (
    BERT,
    BERT_TARGETS,
    LLAMA,
    LLAMA_TARGETS,
    NEST,
    RECIPES,
    Nest,
    hooks,
    inputs_of,
    linear,
    load,
    random_batch,
)
from torch import Tensor, nn

from prox24_deploy.core.errors import RecipeError
from prox24_deploy.model.blocks import (
    BlockCall,
    find_blocks,
    layer_input,
    real_rows,
    record_calls,
    run_block,
    run_model,
    shared_inputs,
    target_layers,
)

LENGTHS = (9, 4, 12)
NO_ARGUMENTS = BlockCall((), {})


@pytest.fixture(scope="module")
def models(tiny_bert: Path, tiny_llama: Path) -> dict[str, nn.Module]:
    return {"bert": load(tiny_bert, BERT), "llama": load(tiny_llama, LLAMA)}


@pytest.fixture
def nest() -> Nest:
    torch.manual_seed(0)
    return Nest().eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def test_the_chained_blocks_and_the_final_norm_give_the_last_state_of_llama(
    models: dict[str, nn.Module],
) -> None:
    model, batch = models["llama"], random_batch(LLAMA, LENGTHS)
    hidden, calls = record_calls(model, find_blocks(model, LLAMA), batch, LLAMA.task)
    for block, call in zip(find_blocks(model, LLAMA), calls, strict=True):
        hidden = run_block(block, call, hidden)
    states = model(**batch.inputs, output_hidden_states=True).hidden_states
    final = model.get_submodule("model.norm")(hidden)
    torch.testing.assert_close(final[batch.real], states[-1][batch.real], rtol=0, atol=1e-6)
    # The order of the blocks and the padding matter, or the comparison would say nothing.
    assert not torch.allclose(states[0], states[1], atol=0.1)


@pytest.mark.parametrize("family", ["bert", "llama"])
@torch.no_grad()
def test_the_input_of_every_layer_of_the_second_block_is_found(
    family: str, models: dict[str, nn.Module]
) -> None:
    model, recipe = models[family], RECIPES[family]
    batch = random_batch(recipe, LENGTHS)
    blocks = find_blocks(model, recipe)
    hidden, calls = record_calls(model, blocks, batch, recipe.task)
    hidden = run_block(blocks[0], calls[0], hidden)
    targets = {f"{recipe.blocks}.1.{name}": name for name in target_layers(blocks[1], recipe)}
    wanted = inputs_of(model, list(targets), batch)
    for path, name in targets.items():
        found = layer_input(blocks[1], calls[1], hidden, linear(blocks[1], name))
        assert torch.equal(found[batch.real], wanted[path][batch.real]), name


def test_calls_are_recorded_of_blocks_that_take_keywords_only(nest: Nest) -> None:
    batch = random_batch(NEST, LENGTHS)
    hidden, calls = record_calls(nest, nest.layers, batch, NEST.task)
    assert torch.equal(hidden, nest.embed(batch.inputs["input_ids"]))
    assert [call.kwargs for call in calls] == [{"scale": 2.0}, {"scale": 3.0}]
    assert [call.args for call in calls] == [(), ()]
    assert nest.reached_the_end == 0


def noted(ran: list[nn.Module]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, args: Any, output: Any) -> None:
        ran.append(module)

    return note


def test_recording_stops_before_the_last_block_computes(models: dict[str, nn.Module]) -> None:
    for family, model in models.items():
        recipe = RECIPES[family]
        blocks = find_blocks(model, recipe)
        first, last = (next(iter(target_layers(b, recipe).values())) for b in blocks)
        ran: list[nn.Module] = []
        handles = [layer.register_forward_hook(noted(ran)) for layer in (first, last)]
        record_calls(model, blocks, random_batch(recipe, LENGTHS), recipe.task)
        for handle in handles:
            handle.remove()
        assert ran == [first]


def test_a_layer_input_is_found_without_running_the_layer(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = models["bert"], random_batch(BERT, LENGTHS)
    block = find_blocks(model, BERT)[0]
    hidden, calls = record_calls(model, find_blocks(model, BERT), batch, BERT.task)
    layer = linear(block, "intermediate.dense")

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("was run")

    monkeypatch.setattr(layer, "forward", refuse)
    assert layer_input(block, calls[0], hidden, layer).shape == hidden.shape


class Wide(nn.Module):
    """A block that calls one layer twice, one never and two with temporaries."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.last, self.twice, self.first, self.other = (
            nn.Linear(4, 4) for _ in range(5)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        total = self.first(hidden + 1) + self.other(hidden + 2)
        total = total + self.twice(hidden) + self.twice(hidden)
        return torch.as_tensor(self.last(total))


def test_layers_are_grouped_by_the_tensor_itself_in_the_order_they_are_reached() -> None:
    block = Wide().requires_grad_(requires_grad=False)
    layers = {n: m for n, m in block.named_children() if isinstance(m, nn.Linear)}
    groups = shared_inputs(block, layers, NO_ARGUMENTS, torch.zeros(1, 2, 4))
    assert groups == [["first"], ["other"], ["twice"], ["last"]]
    assert hooks(block) == 0


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_groups_do_not_depend_on_the_order_of_the_targets(
    family: str, models: dict[str, nn.Module]
) -> None:
    model, recipe = models[family], RECIPES[family]
    blocks = find_blocks(model, recipe)
    hidden, calls = record_calls(model, blocks, random_batch(recipe, LENGTHS), recipe.task)
    layers = target_layers(blocks[0], recipe)
    backwards = dict(reversed(layers.items()))
    groups = shared_inputs(blocks[0], backwards, calls[0], hidden)
    assert groups == shared_inputs(blocks[0], layers, calls[0], hidden)
    assert [len(group) for group in groups] == {"bert": [3, 1, 1, 1], "llama": [3, 1, 2, 1]}[family]


def test_a_tuple_of_outputs_is_reduced_to_the_hidden_states() -> None:
    class Pair(nn.Module):
        def forward(self, hidden: Tensor, scale: float, *, shift: float) -> tuple[Tensor, str]:
            return hidden * scale + shift, "attention"

    out = run_block(Pair(), BlockCall((3.0,), {"shift": 1.0}), torch.ones(1, 2, 4))
    assert torch.equal(out, torch.full((1, 2, 4), 4.0))


def test_a_causal_model_runs_without_a_cache_and_an_encoder_is_not_asked(
    models: dict[str, nn.Module],
) -> None:
    with torch.no_grad():
        decoded = run_model(models["llama"], random_batch(LLAMA, LENGTHS), LLAMA.task)
        encoded = run_model(models["bert"], random_batch(BERT, LENGTHS), BERT.task)
    assert decoded.past_key_values is None
    assert decoded.logits.shape == (3, 12, 260)
    assert encoded.last_hidden_state.shape == (3, 12, 32)


def test_a_list_of_no_blocks_is_refused(nest: Nest) -> None:
    nest.layers = nn.ModuleList()
    with pytest.raises(RecipeError, match=r"'layers', which is a ModuleList, .* not empty"):
        find_blocks(nest, NEST)


def test_something_else_in_place_of_the_blocks_is_refused(nest: Nest) -> None:
    wrong = NEST.model_copy(update={"blocks": "embed"})
    with pytest.raises(RecipeError, match="which is a Embedding, expected a ModuleList"):
        find_blocks(nest, wrong)


def test_targets_are_the_linear_layers_of_the_recipe_less_those_ignored(
    models: dict[str, nn.Module],
) -> None:
    for family, names in (("bert", BERT_TARGETS), ("llama", LLAMA_TARGETS)):
        recipe = RECIPES[family]
        block = find_blocks(models[family], recipe)[1]
        layers = target_layers(block, recipe)
        assert tuple(layers) == names
        assert all(block.get_submodule(name) is layer for name, layer in layers.items())
        narrowed = recipe.model_copy(update={"ignore": [names[0], "*output*", "*down*"]})
        left = [n for n in names[1:] if "output" not in n and "down" not in n]
        assert list(target_layers(block, narrowed)) == left


def test_a_target_that_matches_only_another_kind_of_layer_is_refused(
    models: dict[str, nn.Module],
) -> None:
    block = find_blocks(models["llama"], LLAMA)[0]
    wrong = LLAMA.model_copy(update={"targets": ["mlp.*", "input_layernorm"]})
    with pytest.raises(RecipeError) as caught:
        target_layers(block, wrong)
    text = str(caught.value)
    assert (
        "target 'input_layernorm' matches no linear layer or convolution of a LlamaDecoderLayer"
        in text
    )
    assert all(name in text for name in LLAMA_TARGETS)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hooks_are_gone_after_a_block_has_failed(
    family: str, models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = models[family], RECIPES[family]
    batch, blocks = random_batch(recipe, LENGTHS), find_blocks(model, recipe)
    hidden, calls = record_calls(model, blocks, batch, recipe.task)
    layers = target_layers(blocks[0], recipe)
    first, *_, last = layers.values()
    # transformers keeps hooks of its own on a model that was asked for its hidden states.
    before = hooks(model)

    def fail(_: Tensor) -> Tensor:
        raise FloatingPointError("out of order")

    monkeypatch.setattr(first, "forward", fail)
    attempts: list[Callable[[], object]] = [
        lambda: record_calls(model, blocks, batch, recipe.task),
        lambda: layer_input(blocks[0], calls[0], hidden, last),
        lambda: shared_inputs(blocks[0], layers, calls[0], hidden),
    ]
    for attempt in attempts:
        with pytest.raises(FloatingPointError):
            attempt()
        assert hooks(model) == before


def test_rows_of_padding_are_dropped_and_images_have_none() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    real = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(real_rows(tensor, real), tensor.flatten(0, 1)[[0, 2, 5]])
    windows = torch.arange(48.0).reshape(2, 3, 2, 4)
    whole = torch.ones(2, dtype=torch.bool)
    assert torch.equal(real_rows(windows, whole), windows.reshape(12, 4))
    # A model may cut two images into six windows.
    assert torch.equal(real_rows(windows.flatten(0, 1), whole), windows.reshape(12, 4))


@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 4), (2, 3, 1, 4), (2, 4)])
def test_inputs_without_a_row_for_each_position_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match=r"expected \(2, 3\) positions; list it under `ignore`"):
        real_rows(torch.zeros(shape), torch.tensor([[True, True, True], [True, True, False]]))


def test_flattened_inputs_are_taken_where_no_order_could_matter() -> None:
    tensor = torch.arange(24.0).view(6, 4)
    assert real_rows(tensor, torch.ones(2, 3, dtype=torch.bool)) is tensor
