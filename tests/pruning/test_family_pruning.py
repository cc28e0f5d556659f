"""Every family runs block by block: its calls are recorded, its targets found and pruned."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, FEATURES, PIXELS, VOCABULARY, tiny_model

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe, parse_recipe, shipped_recipes
from prox24_deploy.core.modalities import IMAGES, RECORDINGS
from prox24_deploy.model.batch import IGNORED, Batch
from prox24_deploy.model.blocks import find_blocks, run_block, run_model, target_layers
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.layers import reduction_axis
from prox24_deploy.pruning.activations import record_activations
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.sparsity.pattern import is_24

RECIPES = [parse_recipe(text, family) for family, text in shipped_recipes().items()]


def recipe_of(model: torch.nn.Module) -> Recipe:
    kind = model.config.model_type  # type: ignore[union-attr]
    (recipe,) = [recipe for recipe in RECIPES if kind in recipe.model_types]
    return recipe.for_architecture(type(model).__name__)


def batch(recipe: Recipe) -> Batch:
    """Three rows of twelve tokens, the last padded on the right unless the model is causal.

    Three images where the model reads images, three recordings where it reads speech.
    """
    if recipe.modality is IMAGES:
        pixels = torch.randn(3, *PIXELS.values(), generator=torch.Generator().manual_seed(0))
        return Batch({"pixel_values": pixels}, torch.ones(3, dtype=torch.bool))
    if recipe.modality is RECORDINGS:
        shape = (3, FEATURES["mels"], FEATURES["frames"])
        features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return with_targets(Batch({"input_features": features}, torch.ones(3, dtype=torch.bool)))
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 12, dtype=torch.bool)
    if recipe.task != "text-generation":
        real[2, 7:] = False
    ids[~real] = 1
    known = {
        "input_ids": ids,
        "attention_mask": real.long(),
        "token_type_ids": torch.zeros_like(ids),
    }
    names = [spec.name for spec in recipe.inputs]
    found = Batch({name: known[name] for name in names if name in known}, real)
    return found if recipe.decoder is None else with_targets(found)


def with_targets(found: Batch) -> Batch:
    """Nine tokens for a decoder to write, of the first row only four."""
    targets = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    targets[0, 4:] = IGNORED
    fed = torch.cat([torch.full((3, 1), 2), targets[:, :-1].clamp(min=1)], dim=1)
    return replace(found, inputs=found.inputs | {"decoder_input_ids": fed}, targets=targets)


@pytest.mark.parametrize("row", FAMILIES)
@torch.no_grad()
def test_blocks_run_one_at_a_time_give_what_the_model_gives(row: str) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    text = batch(recipe)
    for part in recipe.parts:
        blocks = find_blocks(model, part)
        activations = record_activations(model, blocks, part, (text,))
        seen: list[torch.Tensor | tuple[torch.Tensor, ...]] = []
        handle = blocks[-1].register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        run_model(model, text, recipe.task)
        handle.remove()
        hidden = activations.dense[0]
        for block, call in zip(blocks, activations.calls[0], strict=True):
            hidden = run_block(block, call, hidden)
        output = seen[0]
        expected = output[0] if isinstance(output, tuple) else output
        assert torch.equal(hidden[activations.real[0]], expected[activations.real[0]])


@pytest.mark.parametrize("row", FAMILIES)
def test_every_target_is_pruned_and_nothing_else(row: str, tmp_path: Path) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    names = [
        f"{part.blocks}.{i}.{name}.weight"
        for part in recipe.parts
        for i, block in enumerate(find_blocks(model, part))
        for name in target_layers(block, part)
    ]
    state = prune_model(
        model, recipe, (batch(recipe),), (batch(recipe),), PruneOptions(method="magnitude"),
        stored_dtype=lambda _: torch.float32, store=BlockStore(tmp_path),
        progress=lambda *_: None,
    )  # fmt: skip
    assert sorted(state.weights) == sorted(names)
    for name in names:
        axis = reduction_axis(model.get_submodule(name.removesuffix(".weight")))  # type: ignore[arg-type]
        assert is_24(model.get_parameter(name), axis)
    pruned = [layer for layer in state.layers if layer.status == "pruned"]
    assert all(0 < float(layer.relative_error or math.nan) < 1 for layer in pruned)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names)
