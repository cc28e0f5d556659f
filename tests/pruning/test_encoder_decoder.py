"""Both halves of an encoder-decoder are pruned, each stream reading its own encoder."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_batches import batch, recipe_of
from tiny_families import tiny_model
from torch import nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.model.batch import Batch
from prox24_deploy.model.blocks import find_blocks, run_model
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.pruning.activations import after_pruning, record_activations
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.selection import left_dense
from prox24_deploy.pruning.sensitivity import measure_sensitivity, over_budget
from prox24_deploy.sparsity.pattern import is_24

ROWS = ["bart", "t5"]
CROSS = {"bart": "encoder_attn.{}_proj", "t5": "layer.1.EncDecAttention.{}"}


def prune(
    model: nn.Module, recipe: Recipe, parts: tuple[Batch, ...], folder: Path, options: PruneOptions
) -> tuple[LayerRecord, ...]:
    return prune_model(
        model, recipe, parts, (), options, stored_dtype=lambda _: torch.float32,
        store=BlockStore(folder), progress=lambda *_: None,
    ).layers  # fmt: skip


def states(model: nn.Module, part: Batch, recipe: Recipe) -> torch.Tensor:
    """What the encoder gives, padding left out."""
    with torch.no_grad():
        found: torch.Tensor = run_model(model, part, recipe.task).encoder_last_hidden_state
    return found[part.real]


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_each_stream_of_a_decoder_reads_its_own_encoder(row: str) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    encoder, decoder = recipe.parts
    part, dense = batch(recipe), deepcopy(model)
    blocks = find_blocks(model, decoder)
    activations = record_activations(model, blocks, decoder, (part,))
    for layer in find_blocks(model, encoder):
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    after = after_pruning(activations, model, blocks, decoder)
    for calls, source in ((after.calls, dense), (after.pruned_calls, model)):
        expected = states(source, part, recipe)
        for call in calls[0]:
            handed = [
                value[part.real]
                for value in (*call.args, *call.kwargs.values())
                if isinstance(value, torch.Tensor) and value.shape == (*part.real.shape, 32)
            ]
            assert [value.equal(expected) for value in handed] == [True]
    assert not states(dense, part, recipe).equal(states(model, part, recipe))


@pytest.mark.parametrize("row", ROWS)
def test_layers_are_calibrated_on_the_positions_that_they_read(row: str, tmp_path: Path) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    part = batch(recipe)
    assert part.targets is not None
    layers = prune(model, recipe, (part,), tmp_path, PruneOptions(method="magnitude"))
    text, target = int(part.real.sum()), int((part.targets >= 0).sum())
    assert (text, target) == (31, 22)
    rows = {layer.name: layer.rows for layer in layers if layer.status == "pruned"}
    reads_text = {
        f"{recipe.parts[1].blocks}.{block}.{CROSS[row].format(name)}"
        for block in (0, 1)
        for name in "kv"
    }
    encoder = f"{recipe.blocks}."
    expected = {n: text if n.startswith(encoder) or n in reads_text else target for n in rows}
    assert rows == expected
    assert reads_text < rows.keys()


@pytest.mark.parametrize("row", ROWS)
def test_the_error_of_cross_attention_counts_that_of_the_encoder(row: str, tmp_path: Path) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    part, dense = batch(recipe), deepcopy(model)
    layers = prune(model, recipe, (part,), tmp_path, PruneOptions(method="magnitude"))
    name = f"{recipe.parts[1].blocks}.1.{CROSS[row].format('v')}"
    before, after = (
        states(source, part, recipe) @ source.get_parameter(f"{name}.weight").detach().T
        for source in (dense, model)
    )
    expected = float((before - after).square().sum() / before.square().sum())
    (found,) = [layer.relative_error for layer in layers if layer.name == name]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model("bart"))
    part = batch(recipe)
    found = []
    for folder in ("once", "twice", "twice"):
        model = tiny_model("bart")
        if folder == "twice":
            # Killed after the first block of the decoder.
            for lost in sorted((tmp_path / folder).glob("block-*"))[3:]:
                lost.unlink()
        prune(model, recipe, (part,), tmp_path / folder, PruneOptions(preset="fast"))
        found.append({name: p.clone() for name, p in model.named_parameters()})
    assert len(list((tmp_path / "once").iterdir())) == 4
    for again in found[1:]:
        assert all(again[name].equal(value) for name, value in found[0].items())


def test_reconstruction_lowers_the_loss_of_the_decoder(tmp_path: Path) -> None:
    small = {"encoder_layers": 1, "decoder_layers": 1}
    recipe = recipe_of(tiny_model("bart", **small))
    first = batch(recipe)
    flipped = {name: value.flip(0) for name, value in first.inputs.items()}
    assert first.targets is not None
    second = replace(first, inputs=flipped, real=first.real.flip(0), targets=first.targets.flip(0))
    models = {}
    for reconstruct in (False, True):
        model = tiny_model("bart", **small)
        options = PruneOptions(preset="fast", reconstruct=reconstruct)
        prune(model, recipe, (first, second), tmp_path / str(reconstruct), options)
        models[reconstruct] = model
    with torch.no_grad():
        dense, plain, tuned = (
            run_model(model, first, recipe.task).logits[first.targets >= 0]
            for model in (tiny_model("bart", **small), models[False], models[True])
        )
    assert 0 < (tuned - dense).norm() < (plain - dense).norm()
    for name, parameter in models[True].named_parameters():
        if ".encoder_attn.k_proj.weight" in name:
            assert is_24(parameter, 1)


def test_a_budget_chooses_among_the_layers_of_both(tmp_path: Path) -> None:
    model = tiny_model("bart")
    recipe = recipe_of(model)
    part = batch(recipe)
    options = PruneOptions(method="magnitude", max_layers=9)
    found = measure_sensitivity(
        model, recipe, (part, part), options,
        dense=left_dense(recipe, model, options), stored_dtype=lambda _: torch.float32,
        progress=lambda *_: None,
    )  # fmt: skip
    assert (found.metric, found.chosen, len(found.layers)) == ("log-perplexity", 9, 32)
    assert {layer.name.split(".")[1] for layer in found.layers} == {"encoder", "decoder"}
    assert len(over_budget(found)) == 23
