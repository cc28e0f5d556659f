"""The two graphs of an encoder-decoder are written, declared and proven together."""

from pathlib import Path

import pytest
import torch
from graph_models import pruned, shipped_recipe
from tiny_families import tiny_model
from torch import nn

from prox24_deploy.core.errors import ExportError, SparsityLostError
from prox24_deploy.graph.check.check import check_onnx, check_path, require_24
from prox24_deploy.graph.export.export import export_graphs
from prox24_deploy.sparsity.pattern import mask_24


def tiny_bart() -> nn.Module:
    """One block in either half."""
    return tiny_model("bart", encoder_layers=1, decoder_layers=1)


def test_each_graph_of_an_encoder_decoder_declares_and_proves_its_own_weights(
    tmp_path: Path,
) -> None:
    model, recipe = pruned(tiny_bart()), shipped_recipe("bart")
    names = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"]
    out = tmp_path / "onnx"
    paths = export_graphs(model, recipe, out, dtype="float32", sparse=names)
    assert sorted(path.name for path in out.iterdir()) == [
        "decoder.onnx", "decoder.onnx.data", "encoder.onnx", "encoder.onnx.data",
    ]  # fmt: skip
    for path, name in zip(paths, names, strict=True):
        (expected,) = [check for check in check_onnx(path) if check.expected]
        assert (expected.module, expected.is_24) == (name, True)
    # Neither file carries the weights of the other half.
    modules = [{check.module for check in check_onnx(path)} for path in paths]
    for half, found in zip(("encoder", "decoder"), modules, strict=True):
        assert len(own := {name for name in found if name.startswith("model.")}) >= 6
        assert all(name.startswith(f"model.{half}.") for name in own)
    again = export_graphs(model, recipe, out, dtype="float32", sparse=names)
    assert again == paths


def test_a_half_of_which_nothing_is_pruned_says_so_and_passes(tmp_path: Path) -> None:
    model, recipe = tiny_bart(), shipped_recipe("bart")
    name = "model.decoder.layers.0.fc2"
    weight = model.get_submodule(name).get_parameter("weight")
    weight.data = torch.where(mask_24(weight.data.abs(), 1), weight.data, 0.0)
    out = tmp_path / "onnx"
    export_graphs(model, recipe, out, dtype="float32", sparse=[name])
    report = check_path(out)
    require_24(report)
    assert report.declared
    assert [check.module for check in report.tensors if check.expected] == [name]
    # Dense twins declare nothing, so that they cannot pass for pruned ones.
    export_graphs(model, recipe, tmp_path / "dense", dtype="float32")
    with pytest.raises(SparsityLostError, match="is not 2:4"):
        require_24(check_path(tmp_path / "dense" / "encoder.onnx"))


def test_a_weight_that_neither_graph_would_prove_is_refused(tmp_path: Path) -> None:
    message = (
        "Module 'lm_head', whose weight should be 2:4, lies in no graph of recipe bart, whose "
        r"blocks are model\.encoder\.layers and model\.decoder\.layers; correct the recipe\."
    )
    with pytest.raises(ExportError, match=message):
        export_graphs(
            tiny_bart(), shipped_recipe("bart"), tmp_path / "o", dtype="float32",
            sparse=["lm_head"],
        )  # fmt: skip


def test_a_dense_weight_in_the_second_graph_leaves_no_file(tmp_path: Path) -> None:
    model = tiny_bart()
    with pytest.raises(SparsityLostError, match=r"decoder\.onnx, .*decoder\.layers\.0\.fc2"):
        export_graphs(
            model, shipped_recipe("bart"), tmp_path / "o", dtype="float32",
            sparse=["model.decoder.layers.0.fc2"],
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
