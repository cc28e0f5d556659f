"""A whole model, quantised block by block, and the file that every backend computes with."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_batches import batch, recipe_of
from opened import Opened, open_tiny
from tiny_families import tiny_model
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError, ModelDirError, RecipeError
from prox24_deploy.core.quantized import LayerQuantization
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import QuantizedFormat
from prox24_deploy.model import mapped
from prox24_deploy.model.batch import Batch, Samples, withhold
from prox24_deploy.model.blocks import run_model
from prox24_deploy.model.directory import load_model
from prox24_deploy.model.layers import is_layer, layer_at, reduction_axis
from prox24_deploy.model.mapped import Memory
from prox24_deploy.quantization.formats import FORMATS
from prox24_deploy.quantization.quantize import (
    load_quantized,
    quantize_directory,
    quantize_model,
    require_samples,
)
from prox24_deploy.quantization.tensors import QuantizedModel, read_quantized
from prox24_deploy.sparsity.pattern import is_24, project_24

CPU = torch.device("cpu")
BOTH: list[QuantizedFormat] = ["fp8", "int8"]
Made = tuple[QuantizedModel, tuple[LayerQuantization, ...], int]


def silent(*_: object) -> None:
    """Progress that nobody sees."""


def make_sparse(model: nn.Module, names: str) -> list[str]:
    """Prune the layers with these names by magnitude."""
    found = [
        n for n, m in model.named_modules() if is_layer(m) and n.endswith(tuple(names.split()))
    ]
    with torch.no_grad():
        for name in found:
            layer = layer_at(model, name)
            layer.weight.copy_(project_24(layer.weight, reduction_axis(layer)))
    return found


def quantize(opened: Opened, form: QuantizedFormat, sparse: list[str]) -> Made:
    return quantize_model(
        opened.model, opened.recipe, opened.batches, form, sparse=sparse, progress=silent
    )


@torch.no_grad()
def logits(model: nn.Module, given: Batch, task: str) -> Tensor:
    found: Tensor = run_model(model, given, task)[0]
    return found[given.real]


@pytest.mark.parametrize("form", BOTH)
@pytest.mark.parametrize(
    ("family", "sparse", "layers"),
    [("llama", "proj", 14), ("bert", "dense query value", 12), ("gpt2", "c_fc c_proj", 8)],
)
def test_every_target_is_quantised_zeros_stay_and_nothing_is_worse_than_the_nearest(
    form: QuantizedFormat,
    family: str,
    sparse: str,
    layers: int,
    request: pytest.FixtureRequest,
    prose: Path,
) -> None:
    opened = open_tiny(request.getfixturevalue(f"tiny_{family}"), prose)
    pruned = make_sparse(opened.model, sparse)
    before = deepcopy(opened.model)
    made, records, withheld = quantize(opened, form, pruned)
    assert withheld == sum(len(each.real) for each in opened.batches[::8])
    assert len(records) == len(made.layers) == layers
    assert made.axes.keys() == set(pruned) & made.layers.keys()
    for record in records:
        assert record.reason == ""
        assert record.error is not None
        assert record.nearest_error is not None
        assert 0 < record.error <= record.nearest_error < 0.05
        assert 0 < record.limit <= 1.01 * record.largest
        assert 0 <= record.clipped < 0.01
    assert any(record.rounding != "nearest" for record in records)
    for name, axis in made.axes.items():
        stored = made.layers[name]
        assert stored.weight.dtype == FORMATS[form].dtype
        assert is_24(stored.weight.float(), axis)
        assert not bool(stored.weight.float()[layer_at(before, name).weight == 0].any())
    text = opened.batches[0]
    expected, found = (logits(m, text, opened.recipe.task) for m in (before, opened.model))
    error = float((found - expected).square().sum() / expected.square().sum())
    assert 0 < error < 0.01


@pytest.mark.parametrize("form", BOTH)
def test_the_file_gives_back_the_model_that_was_measured_bit_for_bit(
    form: QuantizedFormat, tiny_llama: Path, prose: Path, tmp_path: Path
) -> None:
    opened = open_tiny(tiny_llama, prose)
    source = TextSource(kind="file", paths=(), sha256="", samples=64, tokens=4096)
    samples = Samples(batches=opened.batches, source=source)
    out = tmp_path / "quantized" / "tensors.safetensors"
    result = quantize_directory(
        opened.directory, opened.recipe, samples, form, sparse=(), device=torch.device("cpu"),
        out=out, progress=silent,
    )  # fmt: skip
    quantize(opened, form, [])
    loaded = load_quantized(opened.directory, opened.recipe, torch.device("cpu"), out)
    text = opened.batches[-1]
    task = opened.recipe.task
    assert torch.equal(logits(loaded, text, task), logits(opened.model, text, task))
    moved = {layer.moved_into for layer in result.layers} - {""}
    assert bool(moved) == (form == "int8")
    assert {f"{place}.weight" for place in moved} <= (
        read_quantized(out).folded.keys()
        | {f"{name}.weight" for name in read_quantized(out).layers}
    )


def test_where_the_model_lies_changes_no_bit(
    tiny_llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in mapped files, and block by block in the checkpoint as on a GPU."""
    opened = open_tiny(tiny_llama, prose)
    source = TextSource(kind="file", paths=(), sha256="", samples=64, tokens=4096)
    samples = Samples(batches=opened.batches, source=source)
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)

    def offloaded(*args: Any, **_: object) -> nn.Module:
        return load_model(*args, offload=tmp_path / "offload")

    found: list[Any] = []
    for limit in (None, 1, 1):
        memory = Memory(folder=tmp_path / "files", limit=limit, models=1)
        result = quantize_directory(
            opened.directory, opened.recipe, samples, "int8", sparse=(), device=CPU,
            out=tmp_path / str(len(found)), progress=silent, memory=memory,
        )  # fmt: skip
        found.append(result.state_sha256)
        if len(found) == 2:
            monkeypatch.setattr(mapped, "load_mapped", lambda *args, **_: offloaded(*args[:2], CPU))
    assert found == [found[0]] * 3


@pytest.mark.parametrize("row", ["bart", "t5", "resnet, classes", "vit"])
def test_other_kinds_of_model_are_quantised_in_all_their_halves(row: str) -> None:
    model = tiny_model(row)
    recipe = recipe_of(model)
    given = batch(recipe)
    before = deepcopy(model)
    made, records, _ = quantize_model(
        model, recipe, (given, given), "int8", sparse=(), progress=silent
    )
    assert made.layers.keys() == {record.name for record in records if not record.reason}
    for part in recipe.parts:
        assert any(name.startswith(part.blocks) for name in made.layers)
    expected, found = (run_model(m, given, recipe.task)[0].detach() for m in (before, model))
    assert 0 < float((found - expected).square().sum() / expected.square().sum()) < 0.02


@contextmanager
def planted(layer: nn.Module, change: float) -> Iterator[None]:
    """What a layer reads, its first channel multiplied."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = given[0].clone()
        rows[..., 0] *= change
        return (rows, *given[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_a_layer_that_would_be_too_wrong_stays_in_16_bits_by_name(
    tiny_llama: Path, prose: Path
) -> None:
    opened = open_tiny(tiny_llama, prose)
    layer = layer_at(opened.model, "model.layers.1.self_attn.o_proj")
    before = layer.weight.clone()
    # One channel that is large and matters as any other, where nothing is moved out of.
    with planted(layer, 3e4), torch.no_grad():
        layer.weight[:, 0] *= 1e-4
        before[:, 0] *= 1e-4
        made, records, _ = quantize(opened, "int8", [])
    (record,) = (each for each in records if each.reason)
    assert record.name == "model.layers.1.self_attn.o_proj"
    assert record.reason.startswith("its output would be too wrong: error ")
    assert record.name not in made.layers
    assert torch.equal(layer.weight, before)


def test_inputs_without_a_range_are_refused_or_left_by_name(tiny_bert: Path, prose: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    name = "encoder.layer.1.output.dense"
    said = f"Layer {name} reads NaN or infinity .* no range"
    with planted(layer_at(opened.model, name), torch.inf), pytest.raises(ModelDirError, match=said):
        quantize(opened, "fp8", [])
    opened = open_tiny(tiny_bert, prose)
    norm = opened.model.get_submodule("encoder.layer.1.attention.output.LayerNorm")
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.zero_()
    _, records, _ = quantize(opened, "fp8", [])
    reasons = {record.name: record.reason for record in records if record.reason}
    silent_layers = ("encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense")
    assert reasons == dict.fromkeys(silent_layers, "its inputs are all zero on calibration samples")


def test_too_few_samples_are_refused(tiny_bert: Path, prose: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    source = TextSource(kind="file", paths=(), sha256="", samples=7, tokens=448)
    few = Samples(batches=opened.batches[:2], source=source)
    with pytest.raises(CalibrationError, match=r"samples .* got 7; pass more"):
        require_samples(few)
    require_samples(replace(few, source=replace(source, samples=8)))


def test_of_a_single_batch_the_last_samples_are_withheld(tiny_bert: Path, prose: Path) -> None:
    (first, *_) = open_tiny(tiny_bert, prose).batches
    seen, withheld = (part[0] for part in withhold([first]))
    assert len(withheld.real) >= len(first.real) // 8 >= 1
    assert torch.equal(torch.cat([seen.real, withheld.real]), first.real)
    for name, tensor in first.inputs.items():
        assert torch.equal(torch.cat([seen.inputs[name], withheld.inputs[name]]), tensor)


def test_a_model_of_which_nothing_can_be_quantised_is_refused(tiny_bert: Path, prose: Path) -> None:
    opened = open_tiny(tiny_bert, prose)
    with torch.no_grad():
        opened.model.get_submodule("embeddings.LayerNorm").weight.zero_()  # type: ignore[operator]
        opened.model.get_submodule("embeddings.LayerNorm").bias.zero_()  # type: ignore[operator]
        for name, parameter in opened.model.named_parameters():
            if name.startswith("encoder"):
                parameter.zero_()
    with pytest.raises(RecipeError, match="No target of recipe bert can be quantised to fp8"):
        quantize(opened, "fp8", [])
