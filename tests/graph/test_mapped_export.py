"""A model whose weights lie in mapped files is exported and compared as any other."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prox24_deploy.config.recipe import select_recipe
from prox24_deploy.graph.check.model_file import load_onnx
from prox24_deploy.graph.export.export import export_graphs
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model import mapped
from prox24_deploy.model.directory import load_model, open_model_dir


def mappings() -> int:
    """Files of tensors that this process has mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(line.endswith(".tensor (deleted)") for line in lines)


def test_a_mapped_model_is_exported_with_its_bits_and_let_go(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = open_model_dir(tiny_bert)
    recipe = select_recipe(tiny_bert, directory.model_type, None)[0]
    recipe = recipe.for_architecture(directory.architecture)
    held = load_model(directory, recipe, torch.device("cpu"))
    model = mapped.load_mapped(directory, recipe, tmp_path / "weights")
    monkeypatch.setattr(mapped, "_LEAST_BYTES", 1)
    before = mappings()
    made: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept = mapped.MappedFiles(tmp_path).keep(tensor)
        made.append(kept.dtype)
        return kept

    (path,) = export_graphs(model, recipe, tmp_path / "onnx", dtype="float16", keep=keep)
    parameters = dict(held.named_parameters())
    assert len(made) == len(parameters)
    gc.collect()
    assert mappings() == before
    count = 0
    for name, value in load_onnx(path).graph.initializers.items():
        parameter = parameters.get(name.removesuffix("_t"))
        if parameter is not None and value.const_value is not None:
            expected = parameter.half().T if name.endswith("_t") else parameter.half()
            assert np.array_equal(value.const_value.numpy(), expected.numpy()), name
            count += 1
    assert count > 10
    asked = {"dtype": "float16", "twin": "dense", "vocabulary": 50}
    found = compare_with_torch(model, path, recipe, keep=keep, **asked)  # type: ignore[arg-type]
    assert found == compare_with_torch(held, path, recipe, **asked)  # type: ignore[arg-type]
    assert {*made} == {torch.float16, torch.float32}
