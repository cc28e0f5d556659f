"""Inputs and outputs of a graph: the recipe's, and what the model caches."""

from pathlib import Path

import pytest
import torch
from graph_models import Toy, shipped_recipe, tiny_bert, toy_recipe
from tiny_families import tiny_model

from prox24_deploy.core.errors import ExportError
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.export.signature import read_inputs, signature_of


def test_heads_and_head_size_of_the_cache_are_those_of_the_model() -> None:
    # 4 heads share 2 heads of keys of size 8, whatever the hidden size says.
    model = tiny_model("qwen3", head_dim=16, num_hidden_layers=2)
    signature = signature_of(shipped_recipe("qwen3"), model)
    assert [spec.name for spec in signature.inputs] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")),
    ]
    assert signature.inputs[2].axes == ["batch", 2, "past", 16]
    assert signature.outputs[1].axes == ["batch", 2, "past + sequence", 16]
    assert signature.outputs[1].name == "present.0.key"


def test_a_recipe_without_a_cache_is_its_own_signature() -> None:
    recipe = shipped_recipe("bert")
    signature = signature_of(recipe, tiny_bert())
    assert list(signature.inputs) == recipe.inputs
    assert list(signature.outputs) == recipe.outputs


@pytest.mark.parametrize("model", [tiny_bert(), Toy()], ids=["gives none", "takes no argument"])
def test_a_model_that_gives_no_cache_is_named(model: torch.nn.Module, tmp_path: Path) -> None:
    message = rf"{type(model).__name__} returns no key/value cache, but recipe llama says cache ="
    with pytest.raises(ExportError, match=message):
        export_onnx(model, shipped_recipe("llama"), tmp_path / "onnx", dtype="float32")


def test_a_file_tells_its_inputs_as_a_recipe_does(tmp_path: Path) -> None:
    recipe = toy_recipe()
    path = export_onnx(Toy(), recipe, tmp_path / "onnx", dtype="float16")
    assert list(read_inputs(path)) == recipe.inputs
