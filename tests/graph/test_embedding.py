"""Sentence embeddings: the modules behind a model, inside its graph."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from graph_models import Array, shipped_recipe
from sentence_models import pooled, write_tiny_embedder
from tiny_models import VOCABULARY, write_tiny_bert
from tiny_sentences import HIDDEN, NORMALIZE, dense, pooling
from torch import nn

from prox24_deploy.config.recipe import EMBEDDING, SENTENCE_MODULES, Embedding, Recipe, TensorSpec
from prox24_deploy.core.errors import ExportError
from prox24_deploy.core.types import DType
from prox24_deploy.graph.check.modules import MODULE_KEY
from prox24_deploy.graph.export.export import export_onnx
from prox24_deploy.graph.parity.numerics import compare_with_torch
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.sentence import fitted_to_sentences

IDS = np.random.default_rng(0).integers(4, VOCABULARY, size=(4, 9))
# Whole, padded on the right, on the left, and but one token.
MASK = np.ones((4, 9), np.int64)
MASK[1, 5:] = MASK[2, :3] = MASK[3, 1:] = 0
BERT = shipped_recipe("bert")
CPU = torch.device("cpu")


def run(path: Path) -> tuple[Array, Array]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}
    hidden, embedding = session.run(["last_hidden_state", EMBEDDING], feeds)
    return hidden, embedding


def expected_of(mode: str, hidden: Array) -> Array:
    texts = [pooled(mode, h[m != 0].astype(np.float64)) for h, m in zip(hidden, MASK, strict=True)]
    return np.stack(texts)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("float16", 2e-3)])
def test_the_graph_ends_in_what_the_directory_declares(
    tmp_path: Path, dtype: DType, close: float
) -> None:
    modes = ("weightedmean", "lasttoken", "max")
    modules = (pooling(*modes), dense(3 * HIDDEN, 12), NORMALIZE)
    directory = open_model_dir(write_tiny_embedder(tmp_path / "model", *modules))
    recipe = fitted_to_sentences(BERT, directory.architecture, directory.path)
    model = load_model(directory, recipe, CPU)
    path = export_onnx(model, recipe, tmp_path / "onnx", dtype=dtype)
    hidden, embedding = run(path)
    linear = model.get_submodule(f"{SENTENCE_MODULES}.steps.2_Dense.linear")
    assert isinstance(linear, nn.Linear)
    joined = np.concatenate([expected_of(mode, hidden) for mode in modes], axis=1)
    made = np.tanh(joined @ linear.weight.numpy().T + linear.bias.numpy())
    expected = made / np.linalg.norm(made, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=close)
    assert embedding.dtype == np.dtype(dtype)
    checks = compare_with_torch(
        model, path, recipe, dtype=dtype, twin="dense", vocabulary=VOCABULARY
    )
    assert [check.output for check in checks] == ["last_hidden_state", EMBEDDING]
    graph = onnx.load(path, load_external_data=False).graph
    named = {prop.value for node in graph.node for prop in node.metadata_props}
    assert f"{SENTENCE_MODULES}.steps.2_Dense.linear" in named
    assert all(p.key == MODULE_KEY for node in graph.node for p in node.metadata_props)


def asking(embedding: Embedding | None, *outputs: str) -> Recipe:
    specs = [TensorSpec(name=n, dtype="float", axes=["batch", "hidden"]) for n in outputs]
    return BERT.model_copy(update={"outputs": [*BERT.outputs, *specs], "embedding": embedding})


@pytest.mark.parametrize(
    ("mode", "normalize"),
    [
        # These two are in whole builds too, test_sentence_builds.py and test_families.py.
        pytest.param("mean", True, marks=pytest.mark.large),
        pytest.param("cls", False, marks=pytest.mark.large),
        ("mean_sqrt_len_tokens", False),
    ],
)
def test_the_graph_ends_in_what_the_recipe_asks_for(
    tmp_path: Path, mode: str, *, normalize: bool
) -> None:
    recipe = asking(Embedding.model_validate({"pooling": mode, "normalize": normalize}), EMBEDDING)
    model = load_model(open_model_dir(write_tiny_bert(tmp_path / "model", layers=1)), recipe, CPU)
    hidden, embedding = run(export_onnx(model, recipe, tmp_path / "onnx", dtype="float32"))
    expected = expected_of(mode, hidden)
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding, expected, rtol=1e-5, atol=1e-6)


def test_an_embedding_that_nothing_makes_is_refused(tmp_path: Path) -> None:
    recipe = asking(None, EMBEDDING)
    model = load_model(open_model_dir(write_tiny_bert(tmp_path / "model", layers=1)), recipe, CPU)
    with pytest.raises(ExportError, match=f"The model has no output tensor '{EMBEDDING}'"):
        export_onnx(model, recipe, tmp_path / "onnx", dtype="float32")
