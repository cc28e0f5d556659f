"""Numbers that are trained through their rounding: gradients, zeros, and never worse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from opened import open_tiny
from torch import nn

from prox24_deploy.config.options import PruneOptions, RecoverOptions
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import QuantizedFormat, silent
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.pruning.directory import prune_directory
from prox24_deploy.quantization.aware import RoundedWeight, Through
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.quantize import load_quantized, quantize_directory
from prox24_deploy.quantization.tensors import QuantizedLayer, read_quantized, rounded
from prox24_deploy.recovery.objective import objective_for
from prox24_deploy.recovery.recover import Recovery
from prox24_deploy.sparsity.pattern import is_24

CPU = torch.device("cpu")
FAST = RecoverOptions(steps=12, step_tokens=512, learning_rate=0.005, write=False)


@pytest.fixture(scope="module")
def asked(tiny_llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Recovery:
    opened = open_tiny(tiny_llama, prose, tokens=4096)
    count = sum(len(batch.real) for batch in opened.batches)
    source = TextSource(kind="file", paths=(), sha256="0", samples=count, tokens=64 * count)
    samples = Samples(batches=tuple(opened.batches), source=source)
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    prune_directory(
        opened.directory, opened.recipe, samples, samples, PruneOptions(method="magnitude"),
        device=CPU, solved=out.parent / "solved", out=out, progress=silent,
    )  # fmt: skip
    return Recovery(
        dense=opened.directory, pruned=open_model_dir(out), recipe=opened.recipe,
        calibration=samples, options=FAST, seed=0, device=CPU,
    )  # fmt: skip


def quantise(asked: Recovery, folder: Path, form: QuantizedFormat, *, train: bool) -> Any:
    model = load_model(asked.pruned, asked.recipe, CPU)
    sparse = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_24(m.weight)]
    return quantize_directory(
        asked.pruned, asked.recipe, asked.calibration, form, sparse=sparse, device=CPU,
        out=folder / "out.safetensors", progress=silent,
        training=Through(asked=asked, kept=folder / "kept") if train else None,
    )  # fmt: skip


def loss_of(asked: Recovery, tensors: Path) -> float:
    dense = load_model(asked.dense, asked.recipe, CPU)
    model = load_quantized(asked.pruned, asked.recipe, CPU, tensors)
    objective = objective_for(asked.recipe.task)
    with torch.no_grad():
        found = [objective(dense, model, batch) for batch in asked.calibration.batches]
    return float(sum(loss for loss, _ in found)) / sum(number for _, number in found)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_training_through_the_rounding_comes_nearer_on_the_same_scales_and_zeros(
    asked: Recovery, tmp_path: Path, form: QuantizedFormat
) -> None:
    plain = quantise(asked, tmp_path / "plain", form, train=False)
    trained = quantise(asked, tmp_path / "trained", form, train=True)
    found = trained.training
    assert plain.training is None
    assert found.kept > 0
    # Numbers of FP8 lie further apart, and fewer of them move.
    share = {"int8": 0.95, "fp8": 0.99}[form]
    assert found.after < share * found.before
    files = [tmp_path / name / "out.safetensors" for name in ("plain", "trained")]
    # What is written is what was trained, and not what was behind it.
    losses = [loss_of(asked, file) for file in files]
    assert losses[1] < share * losses[0]
    before, after = map(read_quantized, files)
    assert before.layers.keys() == after.layers.keys()
    assert before.axes == after.axes
    for name, layer in before.layers.items():
        now = after.layers[name]
        assert torch.equal(layer.weight_scale, now.weight_scale), name
        assert (layer.input_scale, layer.output_scale) == (now.input_scale, now.output_scale)
        assert not torch.equal(layer.weight, now.weight), name
        assert is_24(now.weight.float()), name


def test_training_that_only_harms_leaves_the_numbers_as_they_were_rounded(
    asked: Recovery, tmp_path: Path
) -> None:
    plain = quantise(asked, tmp_path / "plain", "int8", train=False)
    wild = replace(asked, options=replace(FAST, learning_rate=1e4))
    kept = quantise(wild, tmp_path / "wild", "int8", train=True)
    assert kept.training.kept == 0
    assert kept.training.warning.startswith("Recovery diverged")
    assert kept.state_sha256 == plain.state_sha256


def test_gradients_go_through_rounding_where_nothing_is_clipped() -> None:
    values = torch.tensor([0.3, -0.7, 200.0], requires_grad=True)
    made = rounded(values, FORMATS["int8"], 0.5)
    made.sum().backward()
    assert torch.equal(made.detach(), torch.tensor([0.5, -0.5, 63.5]))
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 0.0]
    layer = nn.Linear(2, 1, bias=False)
    stored = QuantizedLayer(
        weight=torch.zeros(1, 2), weight_scale=torch.tensor([0.25]), input_scale=1.0
    )
    latent = torch.tensor([[0.3, 0.0]], requires_grad=True)
    weight = RoundedWeight(layer, stored, FORMATS["int8"])(latent)
    weight.sum().backward()
    assert weight.tolist() == [[0.25, 0.0]]
    assert latent.grad is not None
    assert latent.grad.tolist() == [[1.0, 1.0]]
