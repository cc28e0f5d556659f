"""Layers that were pruned blindly are named: their error of 0 is no praise."""

import math
import re
from pathlib import Path

import pytest
import torch
from model_cases import BERT, CPU, linear, load, random_batch, silent
from torch import Tensor, nn

from prox24_deploy.config.options import PruneOptions
from prox24_deploy.core.records import LayerRecord
from prox24_deploy.core.types import Method
from prox24_deploy.model.checkpoint import BlockStore
from prox24_deploy.pruning.doubts import doubt_about
from prox24_deploy.pruning.prune import prune_model
from prox24_deploy.pruning.second_moments import SecondMoments

WEIGHT = torch.linspace(-1, 1, 64).view(4, 16)


def moments(rows: Tensor) -> SecondMoments:
    found = SecondMoments.empty(16, CPU)
    found.add(rows, rows)
    return found


ROWS = torch.linspace(-2, 3, 320).view(20, 16)


@pytest.mark.parametrize(
    ("weight", "stored", "rows", "reason"),
    [
        (WEIGHT, torch.float32, ROWS, "^$"),
        (WEIGHT, torch.float16, ROWS, "^$"),
        (WEIGHT * 1e-4, torch.float16, ROWS, "^$"),
        (WEIGHT * 1e-18, torch.bfloat16, ROWS, "^$"),
        (WEIGHT, torch.float32, ROWS * 1e-18, "^$"),
        (WEIGHT * 0, torch.float32, ROWS, "^all its weights are zero$"),
        (WEIGHT, torch.float32, ROWS * 0, "^its inputs are all zero on the calibration samples, "),
        (WEIGHT, torch.float32, ROWS * (torch.arange(16) > 0), "^$"),
        (WEIGHT, torch.float32, ROWS * (torch.arange(16) > 1), "^2 of its 16 inputs are zero on a"),
        (WEIGHT * 1e-44, torch.float32, ROWS, "^its weights are so near the smallest number"),
        (WEIGHT * 1e-25, torch.bfloat16, ROWS, "^its weights are so near the smallest number"),
        (WEIGHT * 1e-5, torch.float16, ROWS, "^its weights are so near the smallest number"),
        (WEIGHT, torch.float32, ROWS * 1e-21, "^its inputs are so near the smallest number of f"),
    ],
)
def test_what_an_error_cannot_tell_is_said(
    weight: Tensor, stored: torch.dtype, rows: Tensor, reason: str
) -> None:
    found = doubt_about(weight, stored, moments(rows))
    assert re.search(reason, found)


def test_a_layer_of_which_nothing_was_chosen_is_blamed_for_zeros_alone() -> None:
    assert doubt_about(WEIGHT, torch.float32, moments(ROWS * 0), chosen=False) == ""
    assert doubt_about(WEIGHT * 0, torch.float32, moments(ROWS), chosen=False) != ""


def pruned(model: nn.Module, folder: Path, method: Method) -> dict[str, LayerRecord]:
    state = prune_model(
        model, BERT, (random_batch(BERT, [9, 30, 17]),), (random_batch(BERT, [12], 1),),
        PruneOptions(method=method, preset="fast"), stored_dtype=lambda _: torch.float32,
        store=BlockStore(folder), progress=silent,
    )  # fmt: skip
    return {layer.name: layer for layer in state.layers if layer.status == "pruned"}


@pytest.mark.parametrize("method", ["prox", "ista", "sparsegpt", "wanda", "magnitude"])
def test_zero_inputs_and_zero_layers_are_named_whatever_prunes(
    method: Method, tiny_bert: Path, tmp_path: Path
) -> None:
    model = load(tiny_bert, BERT)
    block, last = "encoder.layer.0", "encoder.layer.1"
    with torch.no_grad():
        for parameter in model.get_submodule(f"{block}.attention.output.LayerNorm").parameters():
            parameter.zero_()
        # So that the next block sees something again.
        model.get_submodule(f"{block}.output.LayerNorm").get_parameter("bias").normal_()
        linear(model, f"{last}.output.dense").weight.zero_()
        linear(model, f"{last}.intermediate.dense").weight.mul_(1e-42)
    layers = pruned(model, tmp_path, method)
    noted = {name: layer.note for name, layer in layers.items() if layer.note}
    for name in ("intermediate.dense", "output.dense"):
        assert noted.pop(f"{block}.{name}").startswith("its inputs are all zero on the calibr")
    assert noted.pop(f"{last}.output.dense") == "all its weights are zero"
    assert noted.pop(f"{last}.intermediate.dense").startswith("its weights are so near the small")
    assert not noted
    assert all(math.isfinite(layer.relative_error or 0.0) for layer in layers.values())


def test_a_sound_model_has_no_doubtful_layer(tiny_bert: Path, tmp_path: Path) -> None:
    layers = pruned(load(tiny_bert, BERT), tmp_path, "prox")
    assert len(layers) == 12
    assert not any(layer.note for layer in layers.values())
