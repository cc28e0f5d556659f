"""Sentence embeddings: pooling and normalisation inside the graph."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from graph_models import shipped_recipe, tiny_bert

from prox24_deploy.graph.export import export_onnx
from prox24_deploy.graph.numerics import compare_with_torch
from prox24_deploy.recipe import EMBEDDING, Embedding, Recipe, TensorSpec

IDS = np.random.default_rng(0).integers(64, size=(3, 9))
MASK = (np.arange(9) < np.array([[9], [5], [1]])).astype(np.int64)
HIDDEN = TensorSpec(name="last_hidden_state", dtype="float", axes=["batch", "sequence", "hidden"])
POOLED = TensorSpec(name=EMBEDDING, dtype="float", axes=["batch", "hidden"])


def recipe(embedding: Embedding) -> Recipe:
    update = {"outputs": [HIDDEN, POOLED], "embedding": embedding}
    return shipped_recipe("bert").model_copy(update=update)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_graph_pools_real_tokens_and_normalises(
    tmp_path: Path, pooling: str, normalize: bool
) -> None:
    asked = recipe(Embedding.model_validate({"pooling": pooling, "normalize": normalize}))
    model = tiny_bert()
    path = export_onnx(model, asked, tmp_path / "onnx", dtype="float32")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}
    hidden, pooled = session.run(["last_hidden_state", EMBEDDING], feeds)
    means = [hidden[i, : MASK[i].sum()].mean(0) for i in range(3)]
    expected = np.stack(means) if pooling == "mean" else hidden[:, 0]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-6)
    checks = compare_with_torch(model, path, asked, dtype="float32", twin="dense", vocabulary=64)
    assert [check.output for check in checks] == ["last_hidden_state", EMBEDDING]
