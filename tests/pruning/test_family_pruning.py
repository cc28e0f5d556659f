"""Every family runs block by block: its calls are recorded, its targets found and pruned."""

import math
from pathlib import Path

import pytest
import torch
from family_batches import batch, recipe_of
from tiny_families import FAMILIES, tiny_model

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.model.blocks import find_blocks, run_block, run_model, target_layers
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.model.layers import reduction_axis
from prox24_deploy.pruning.activations import record_activations
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.sparsity.pattern import is_24


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
