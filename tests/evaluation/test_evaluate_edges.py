"""Accuracy figures where texts, poolings or models are out of the ordinary."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from model_cases import BERT, LLAMA, load, padded_batch, random_batch, silent, token_rows
from torch import Tensor, nn

from prox24_deploy.core.errors import ModelDirError
from prox24_deploy.core.records import Estimate
from prox24_deploy.evaluation.embeddings import evaluate_embeddings
from prox24_deploy.evaluation.estimate import mean_estimate
from prox24_deploy.evaluation.language import evaluate_text_generation

LENGTHS = (5, 9, 14, 3, 11, 7)


def shaken(path: Path, amount: float) -> nn.Module:
    """A BERT with noise on every weight."""
    model = load(path, BERT)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def pair(tiny_bert: Path) -> tuple[nn.Module, nn.Module]:
    return load(tiny_bert, BERT), shaken(tiny_bert, 0.3)


def value_of(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [3.0, 3.0], [-2.5, 1e6]])
def test_the_standard_error_is_the_sample_deviation_over_the_root_of_the_count(
    values: list[float],
) -> None:
    estimate = mean_estimate(torch.tensor(values))
    assert estimate.value == pytest.approx(statistics.fmean(values))
    expected = statistics.stdev(values) / math.sqrt(len(values))
    assert estimate.standard_error == pytest.approx(expected)


def test_means_are_taken_in_float64() -> None:
    # In float32 the small values would vanish beside the large one.
    values = torch.tensor([1e8, 1.0, 1.0, 1.0])
    assert mean_estimate(values).value == (1e8 + 3) / 4


def test_padding_does_not_influence_embeddings(pair: tuple[nn.Module, nn.Module]) -> None:
    rows = token_rows(LENGTHS, seed=1)
    figures = [
        evaluate_embeddings(*pair, batches, silent)
        for batches in (
            tuple(padded_batch(BERT, [row]) for row in rows),
            (padded_batch(BERT, rows, extra=20),),
            (padded_batch(BERT, rows[:2]), padded_batch(BERT, rows[2:], extra=3)),
        )
    ]
    cosines = [value_of(cosine.agreement) for cosine, _ in figures]
    assert cosines[0] < 0.999
    assert cosines[1:] == pytest.approx([cosines[0]] * 2, abs=1e-5)
    assert [metric.samples for metric, _ in figures] == [len(LENGTHS)] * 3
    neighbours = [value_of(metric.agreement) for _, metric in figures]
    assert neighbours[1:] == [neighbours[0]] * 2


class Table(nn.Module):
    """A model whose hidden state is a row of a table, the same for every token of a text."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows), requires_grad=False)

    def forward(self, input_ids: Tensor, **_: Tensor) -> "Table":
        self.last_hidden_state = self.rows[input_ids]
        return self


def test_neighbours_are_looked_for_among_all_texts_of_all_batches() -> None:
    # Texts 0 and 2 are neighbours, and 1 and 3, though they lie in different batches.
    angles = torch.tensor([0.0, 2.0, 0.2, 2.3])
    near = torch.stack([angles.cos(), angles.sin()], 1).tolist()
    # In the other model text 0 is nearest to 1, and 1 to 0; 2 and 3 keep their neighbours.
    other = torch.tensor([0.0, 0.1, 0.3, 0.35])
    far = torch.stack([other.cos(), other.sin()], 1).tolist()
    batches = tuple(padded_batch(BERT, [[2 * i] * 3, [2 * i + 1] * 2]) for i in range(2))
    cosine, agreement = evaluate_embeddings(Table(near), Table(far), batches, silent)
    # near: 0-2, 1-3, 2-0, 3-1; far: 0-1, 1-0, 2-3, 3-2.
    assert value_of(agreement.agreement) == 0.0
    expected = statistics.fmean(math.cos(a - b) for a, b in zip(angles, other, strict=True))
    assert value_of(cosine.agreement) == pytest.approx(expected, abs=1e-6)
    _, same = evaluate_embeddings(
        Table(near), Table([[2 * x, 2 * y] for x, y in near]), batches, silent,
    )  # fmt: skip
    assert value_of(same.agreement) == 1.0


def test_a_broken_embedding_is_refused_and_never_averaged() -> None:
    sound, broken = Table([[1.0, 0.0], [0.6, 0.8]]), Table([[1.0, 0.0], [math.nan, 0.8]])
    batches = (padded_batch(BERT, [[0, 0], [1]]),)
    for pair in ((sound, broken), (broken, sound)):
        with pytest.raises(ModelDirError, match="An embedding is NaN or infinite"):
            evaluate_embeddings(*pair, batches, silent)


def test_a_perplexity_beyond_all_numbers_is_refused(tiny_llama: Path) -> None:
    dense, broken = load(tiny_llama, LLAMA), load(tiny_llama, LLAMA)
    broken.get_parameter("model.norm.weight").mul_(1e5)
    batch = random_batch(LLAMA, [20, 20])
    with pytest.raises(ModelDirError, match=r"The pruned model has a log-perplexity of \d"):
        evaluate_text_generation(dense, broken, (batch,), silent)
    broken.get_parameter("model.norm.weight").mul_(math.nan)
    with pytest.raises(ModelDirError, match="The dense model has a log-perplexity of nan"):
        evaluate_text_generation(broken, dense, (batch,), silent)


def test_windows_are_weighted_alike_and_split_over_batches_as_one(tiny_llama: Path) -> None:
    dense, sparse = load(tiny_llama, LLAMA), load(tiny_llama, LLAMA)
    sparse.get_parameter("model.norm.weight").mul_(0.5)
    rows = token_rows([24] * 6, seed=3)
    whole = evaluate_text_generation(dense, sparse, (padded_batch(LLAMA, rows),), silent)
    split = tuple(padded_batch(LLAMA, part) for part in (rows[:1], rows[1:]))
    calls: list[tuple[str, int, int]] = []
    parts = evaluate_text_generation(dense, sparse, split, lambda *call: calls.append(call))
    assert calls == [("evaluate", 0, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]
    for metric, other in zip(whole, parts, strict=True):
        assert (metric.name, metric.samples) == (other.name, 6)
        for name in ("dense", "sparse", "difference", "agreement"):
            left, right = getattr(metric, name), getattr(other, name)
            assert (left is None) == (right is None)
            if left is not None:
                assert right.value == pytest.approx(left.value, rel=1e-4, abs=1e-6)
                assert right.standard_error == pytest.approx(left.standard_error, rel=1e-3)
