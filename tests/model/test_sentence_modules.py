"""Every module against its definition, and against sentence-transformers itself."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from model_cases import BERT, CPU
from sentence_models import pooled, write_tiny_embedder
from tiny_sentences import DROPOUT, HIDDEN, NORMALIZE, Module, dense, layer_norm, pooling
from torch import Tensor, nn

from prox24_deploy.config.recipe import SENTENCE_MODULES, PoolingMode
from prox24_deploy.core.records import TextSource
from prox24_deploy.evaluation.embeddings import embed
from prox24_deploy.evaluation.evaluate import evaluate_models
from prox24_deploy.model.batch import Batch, Samples
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.sentence_modules import Normalize, Pooling

MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)
EVERYTHING: tuple[Module, ...] = (
    pooling(*MODES),
    dense(len(MODES) * HIDDEN, 24, activation="GELU"),
    DROPOUT,
    layer_norm(24),
    dense(24, 24, bias=False, activation="SiLU", residual=True),
    dense(24, 16, residual=True),
    NORMALIZE,
)


def states(count: int = 4, width: int = 7) -> tuple[Tensor, Tensor]:
    """Random states, and masks of texts that are short at either end."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, HIDDEN, generator=draw)
    mask = torch.ones(count, width, dtype=torch.int64)
    mask[1, 3:] = 0
    mask[2, :4] = 0
    mask[3, 1:] = 0
    return hidden, mask


@pytest.mark.parametrize("mode", MODES)
def test_every_pooling_is_what_its_name_says(mode: PoolingMode) -> None:
    hidden, mask = states()
    expected = [pooled(mode, h[m != 0].numpy()) for h, m in zip(hidden, mask, strict=True)]
    found = Pooling([mode])(hidden, mask).numpy()
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6, atol=1e-6)
    # What lies on padding has no part in it.
    hidden[mask == 0] = 1e4
    np.testing.assert_array_equal(Pooling([mode])(hidden, mask).numpy(), found)


def test_several_poolings_are_joined_in_their_order() -> None:
    hidden, mask = states()
    parts = [Pooling([mode])(hidden, mask) for mode in ("max", "cls")]
    assert torch.equal(Pooling(["max", "cls"])(hidden, mask), torch.cat(parts, dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_and_squares_do_not_overflow_half_precision(dtype: torch.dtype) -> None:
    hidden = torch.full((1, 300, HIDDEN), 400.0, dtype=dtype)
    mask = torch.ones(1, 300, dtype=torch.int64)
    for mode in ("mean", "weightedmean"):
        found = Pooling([mode])(hidden, mask)
        assert found.dtype == dtype
        torch.testing.assert_close(found, hidden[:, 0])
    unit = Normalize()(hidden[:, 0])
    assert unit.dtype == dtype
    torch.testing.assert_close(unit, torch.full_like(unit, HIDDEN**-0.5), rtol=1e-2, atol=0)


def test_an_embedding_of_zeros_has_no_direction() -> None:
    assert torch.equal(Normalize()(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every kind of module, every pooling and every kind of residual."""
    return write_tiny_embedder(tmp_path_factory.mktemp("models") / "embedder", *EVERYTHING)


def test_the_library_gives_the_same_embeddings(embedder: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(embedder), device="cpu", local_files_only=True)
    model.eval()
    ours = load_model(open_model_dir(embedder), BERT, CPU)
    hidden, mask = states()
    features: dict[str, Any] = {"token_embeddings": hidden.clone(), "attention_mask": mask}
    with torch.no_grad():
        for module in list(model)[1:]:
            features = module(features)
        found = ours.get_submodule(SENTENCE_MODULES)(hidden, mask)
    assert found.shape == (4, 16)
    torch.testing.assert_close(found, features["sentence_embedding"], rtol=0, atol=1e-6)


def test_the_modules_are_part_of_the_model_and_no_part_of_its_forward_pass(embedder: Path) -> None:
    model = load_model(open_model_dir(embedder), BERT, CPU)
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert [name for name in layers if name.startswith(SENTENCE_MODULES)] == [
        "sentence_modules.steps.2_Dense.linear",
        "sentence_modules.steps.5_Dense.linear",
        "sentence_modules.steps.6_Dense.linear",
        "sentence_modules.steps.6_Dense.residual",
    ]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = torch.tensor([[2, 9, 9, 3]])
    with torch.no_grad():
        assert model(ids).last_hidden_state.shape == (1, 4, HIDDEN)


def test_accuracy_is_that_of_the_embedding_behind_all_modules(embedder: Path) -> None:
    model = load_model(open_model_dir(embedder), BERT, CPU)
    other = load_model(open_model_dir(embedder), BERT, CPU)
    last = other.get_submodule(f"{SENTENCE_MODULES}.steps.6_Dense.linear")
    draw = torch.Generator().manual_seed(1)
    assert isinstance(last, nn.Linear)
    # The hidden states are the same: only what is behind them tells the two apart.
    last.weight += 0.5 * torch.randn(last.weight.shape, generator=draw)
    ids = torch.randint(4, 200, (6, 9), generator=draw)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[2:, 5:] = False
    batch = Batch({"input_ids": ids, "attention_mask": real.long()}, real)
    with torch.no_grad():
        hidden = model(**batch.inputs).last_hidden_state
        first, second = (m.get_submodule(SENTENCE_MODULES)(hidden, real) for m in (model, other))
        torch.testing.assert_close(embed(model, batch), first.double(), rtol=0, atol=1e-6)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=6, tokens=54)
    result = evaluate_models(
        model, other, BERT.task, Samples(batches=(batch,), source=source), embedder, lambda *_: None
    )
    cosine = result.metrics[0].agreement
    assert cosine is not None
    expected = float(nn.functional.cosine_similarity(first, second).mean())
    assert cosine.value == pytest.approx(expected, abs=1e-5)
    assert cosine.value < 0.99
