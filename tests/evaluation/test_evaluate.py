"""Accuracy figures against the models' own losses and plain formulas."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from opened import open_tiny
from torch import Tensor, nn

from prox24_deploy.core.records import TextSource
from prox24_deploy.evaluation.embeddings import evaluate_embeddings
from prox24_deploy.evaluation.estimate import mean_estimate
from prox24_deploy.evaluation.evaluate import evaluate_models
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.model.batch import Samples


def quiet(*_: object) -> None:
    """No progress."""


def shaken(model: nn.Module, amount: float = 0.05) -> nn.Module:
    """The same model with noise on every weight."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """An oracle in NumPy, over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


@torch.no_grad()
def test_perplexity_is_that_of_the_models_own_loss(tiny_llama: Path, prose: Path) -> None:
    opened = open_tiny(tiny_llama, prose)
    dense, sparse = opened.model, shaken(open_tiny(tiny_llama, prose).model)
    perplexity, log_perplexity, agreement, divergence = evaluate_text_generation(
        dense, sparse, opened.batches, quiet
    )
    rows = torch.cat([batch.inputs["input_ids"] for batch in opened.batches])
    losses = torch.tensor([
        [float(model(row[None], labels=row[None]).loss) for row in rows]
        for model in (dense, sparse)
    ]).double()  # fmt: skip
    assert perplexity.samples == len(rows)
    for estimate, loss in zip((perplexity.dense, perplexity.sparse), losses, strict=True):
        assert estimate is not None
        assert estimate.value == pytest.approx(math.exp(float(loss.mean())), rel=1e-5)
        spread = float(loss.std()) / math.sqrt(len(rows))
        assert estimate.standard_error == pytest.approx(estimate.value * spread, rel=1e-4)
    gap = losses[1] - losses[0]
    assert log_perplexity.difference is not None
    assert log_perplexity.difference.value == pytest.approx(float(gap.mean()), abs=1e-5)
    error = float(gap.std()) / math.sqrt(len(rows))
    assert log_perplexity.difference.standard_error == pytest.approx(error, rel=1e-3)
    tops = [model(rows).logits[:, :-1].argmax(-1) for model in (dense, sparse)]
    assert agreement.agreement is not None
    assert agreement.agreement.value == pytest.approx(float((tops[0] == tops[1]).double().mean()))
    assert 0.0 < agreement.agreement.value < 1.0
    logs = [log_softmax(model(rows).logits[:, :-1].double().numpy()) for model in (dense, sparse)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean(-1)
    assert divergence.agreement is not None
    assert divergence.agreement.value == pytest.approx(float(kl.mean()), rel=1e-4)
    spread = float(kl.std(ddof=1)) / math.sqrt(len(rows))
    assert divergence.agreement.standard_error == pytest.approx(spread, rel=1e-3)


def test_a_model_agrees_with_itself(tiny_llama: Path, tiny_bert: Path, prose: Path) -> None:
    decoder = open_tiny(tiny_llama, prose)
    _, gap, top, divergence = evaluate_text_generation(
        decoder.model, decoder.model, decoder.batches, quiet
    )
    assert gap.difference is not None
    assert (gap.difference.value, gap.difference.standard_error) == (0.0, 0.0)
    assert divergence.agreement is not None
    assert (divergence.agreement.value, divergence.agreement.standard_error) == (0.0, 0.0)
    encoder = open_tiny(tiny_bert, prose)
    cosine, neighbours = evaluate_embeddings(encoder.model, encoder.model, encoder.batches, quiet)
    for metric in (top, neighbours, cosine):
        assert metric.agreement is not None
        assert metric.agreement.value == pytest.approx(1.0, abs=1e-12)


@torch.no_grad()
def test_cosine_and_neighbours_are_those_of_single_texts(tiny_bert: Path, prose: Path) -> None:
    """One text at a time and without padding, pooled and compared by the plain formulas."""
    opened = open_tiny(tiny_bert, prose)
    dense, sparse = opened.model, shaken(open_tiny(tiny_bert, prose).model)
    cosine, neighbours = evaluate_embeddings(dense, sparse, opened.batches, quiet)
    embedded: list[list[Tensor]] = [[], []]
    for batch in opened.batches:
        for ids, real in zip(batch.inputs["input_ids"], batch.real, strict=True):
            for model, found in zip((dense, sparse), embedded, strict=True):
                hidden = model(ids[real][None]).last_hidden_state[0]
                found.append(hidden.double().mean(0))
    first, second = (torch.stack(found) for found in embedded)
    expected = nn.functional.cosine_similarity(first, second)
    assert cosine.samples == len(expected)
    assert cosine.agreement is not None
    assert cosine.agreement.value == pytest.approx(float(expected.mean()), abs=1e-5)
    error = float(expected.std()) / math.sqrt(len(expected))
    assert cosine.agreement.standard_error == pytest.approx(error, rel=1e-2)
    nearest = []
    for embeddings in (first, second):
        unit = nn.functional.normalize(embeddings, dim=1)
        similarity = unit @ unit.T - 10 * torch.eye(len(unit))
        nearest.append(similarity.argmax(1))
    assert neighbours.agreement is not None
    same = float((nearest[0] == nearest[1]).double().mean())
    assert neighbours.agreement.value == pytest.approx(same, abs=2 / len(first))


@pytest.mark.parametrize(
    ("fixture", "headline"), [("tiny_bert", "embedding cosine"), ("tiny_llama", "perplexity")]
)
def test_the_task_decides_the_headline(
    request: pytest.FixtureRequest, prose: Path, fixture: str, headline: str
) -> None:
    path: Path = request.getfixturevalue(fixture)
    opened = open_tiny(path, prose)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=1, tokens=1)
    calls: list[tuple[str, int, int]] = []
    progress: Callable[[str, int, int], None] = lambda *call: calls.append(call)  # noqa: E731
    result = evaluate_models(
        opened.model,
        opened.model,
        opened.recipe.task,
        Samples(batches=opened.batches, source=source),
        path,
        progress,
    )
    assert result.metrics[0].name == headline
    assert result.evaluation == source
    assert calls[-1] == ("evaluate", len(opened.batches), len(opened.batches))


@torch.no_grad()
def test_values_per_sample_have_the_mean_and_the_error_of_every_metric(
    tiny_llama: Path, tiny_bert: Path, prose: Path
) -> None:
    decoder, encoder = (open_tiny(path, prose) for path in (tiny_llama, tiny_bert))
    metrics = (
        *evaluate_text_generation(
            decoder.model, shaken(open_tiny(tiny_llama, prose).model), decoder.batches, quiet
        ),
        *evaluate_embeddings(
            encoder.model,
            shaken(open_tiny(tiny_bert, prose).model),
            encoder.batches,
            quiet,
        ),
    )
    assert [metric.name for metric in metrics] == [
        "perplexity", "log-perplexity", "top-1 agreement", "KL divergence", "embedding cosine",
        "nearest-neighbour agreement",
    ]  # fmt: skip
    for metric in metrics:
        told = metric.sparse or metric.agreement
        assert told is not None
        found = mean_estimate(torch.tensor(metric.values, dtype=torch.float64))
        assert len(metric.values) == metric.samples, metric.name
        assert found.value == pytest.approx(told.value, rel=1e-7), metric.name
        assert found.standard_error == pytest.approx(told.standard_error, rel=1e-6), metric.name


def test_one_value_has_no_spread() -> None:
    estimate = mean_estimate(torch.tensor([2.0]))
    assert (estimate.value, estimate.standard_error) == (2.0, 0.0)
