"""A file that differs names where it begins to; an activation that overflows names its module."""

from pathlib import Path

import pytest
import torch
from graph_models import TOY_RECIPE, Toy, shipped_recipe, tiny_bert, tiny_llama, toy_recipe

from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.parity.numerics import compare_with_torch


def compare(model: torch.nn.Module, path: Path, recipe: Recipe, dtype: DType = "float32") -> None:
    compare_with_torch(model, path, recipe, dtype=dtype, twin="dense", vocabulary=16)


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("llama", "model.layers.0.input_layernorm"),
        ("llama", "model.layers.0.self_attn.v_proj"),
        ("llama", "model.layers.1.mlp.up_proj"),
        ("llama", "model.norm"),
        ("bert", "embeddings.LayerNorm"),
        ("bert", "encoder.layer.1.attention.output.dense"),
    ],
)
def test_the_first_module_that_differs_is_named(
    exported: dict[str, Path], family: str, module: str
) -> None:
    model = {"llama": tiny_llama, "bert": tiny_bert}[family]()
    weight = model.get_submodule(module).get_parameter("weight").data
    weight += torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    message = rf"differs from PyTorch by .*, and the difference begins at module {module}; the file"
    with pytest.raises(ExportError, match=message):
        compare(model, exported[family], shipped_recipe(family))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        family: export_onnx(model, shipped_recipe(family), folder / family, dtype="float32")
        for family, model in (("llama", tiny_llama()), ("bert", tiny_bert()))
    }


class Shifted(Toy):
    """Differs from its parent after the last module."""

    def forward(self, x: torch.Tensor) -> object:  # type: ignore[override]
        result = super().forward(x)
        result.last_hidden_state = result.last_hidden_state + 1.0
        return result


def test_a_difference_between_modules_is_not_blamed_on_one(tmp_path: Path) -> None:
    path = export_onnx(Toy(), toy_recipe(), tmp_path / "onnx", dtype="float32")
    with pytest.raises(ExportError, match="begins outside the modules that can be compared; the"):
        compare(Shifted(), path, toy_recipe())


def large(factor: float) -> Toy:
    model = Toy()
    model.second.weight.data.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_activation_that_overflows_float16_names_its_module(
    tmp_path: Path, dtype: DType
) -> None:
    model = large(10000.0)
    path = export_onnx(model, toy_recipe(), tmp_path / "onnx", dtype=dtype)
    if dtype == "float32":
        compare(model, path, toy_recipe(TOY_RECIPE))
        return
    message = (
        r"Module second gives values up to \d.*, which do not fit float16, whose limit is 65504; "
        r"export with --dtype bfloat16 or float32\."
    )
    with pytest.raises(ExportError, match=message):
        compare(model, path, toy_recipe(TOY_RECIPE), dtype)


class Inner(Toy):
    """Squares large values and takes the root again: no module gives what lies between."""

    def forward(self, x: torch.Tensor) -> object:  # type: ignore[override]
        result = super().forward(x)
        result.last_hidden_state = (result.last_hidden_state * 1e4).square().sqrt() * 1e-4
        return result


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_tensor_that_overflows_between_modules_is_named(tmp_path: Path, dtype: DType) -> None:
    path = export_onnx(Inner(), toy_recipe(), tmp_path / "onnx", dtype=dtype)
    if dtype == "float32":
        compare(Inner(), path, toy_recipe())
        return
    message = r"Tensor \w+ of .*model\.onnx, inside the model itself, overflows float16"
    with pytest.raises(ExportError, match=message):
        compare(Inner(), path, toy_recipe(), dtype)


def test_attention_scores_that_overflow_float16_are_named(tmp_path: Path) -> None:
    model = tiny_bert()
    attention = model.get_submodule("encoder.layer.1.attention.self")
    for name in ("query", "key"):
        attention.get_submodule(name).get_parameter("weight").data.mul_(2e4)
    path = export_onnx(model, shipped_recipe("bert"), tmp_path / "onnx", dtype="float16")
    with pytest.raises(ExportError, match=r"inside encoder\.layer\.1\.attention\.self, overflows"):
        compare(model, path, shipped_recipe("bert"), "float16")
