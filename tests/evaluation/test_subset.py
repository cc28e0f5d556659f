"""Some of the samples, evenly spaced, in shapes that an engine takes."""

import pytest
import torch

from prox24_deploy.core.modalities import IMAGES
from prox24_deploy.core.records import TextSource
from prox24_deploy.evaluation.subset import EngineShapes, behind_a_past, take
from prox24_deploy.model.batch import IGNORED, Batch, Samples, pad_rows

NAMES = ["input_ids", "attention_mask"]


def texts(lengths: list[int], per_batch: int = 4) -> Samples:
    """Row i consists of the token i + 1."""
    rows = [[i + 1] * length for i, length in enumerate(lengths)]
    groups = [rows[i : i + per_batch] for i in range(0, len(rows), per_batch)]
    batches = tuple(pad_rows(group, NAMES, 0) for group in groups)
    source = TextSource(
        kind="file", paths=("x",), sha256="0", samples=len(rows), tokens=sum(lengths)
    )
    return Samples(batches=batches, source=source, labels=torch.arange(len(rows)))


def kept(samples: Samples) -> list[int]:
    return [int(row[0]) - 1 for batch in samples.batches for row in batch.inputs["input_ids"]]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (10_000, list(range(10))),
        (100, list(range(10))),
        (99, [0, 2, 4, 6, 8]),
        (30, [0, 4, 8]),
        (1, [0, 5]),
    ],
)
def test_samples_are_evenly_spaced_over_batches_and_at_least_two(
    tokens: int, expected: list[int]
) -> None:
    samples = texts([10] * 10)
    found, cut = take(samples, tokens, None)
    assert kept(found) == expected
    assert cut == 0
    assert found.labels is not None
    assert found.labels.tolist() == expected
    assert (found.source.samples, found.source.tokens) == (len(expected), 10 * len(expected))
    assert found.source.sha256 == samples.source.sha256


def test_a_last_batch_that_no_sample_is_taken_of_is_passed_over() -> None:
    """The next sample in turn may lie behind its end."""
    found, _ = take(texts([512] * 33, per_batch=16), 2048, None)
    assert 2 <= found.source.samples <= 5
    assert sum(len(batch.real) for batch in found.batches) == found.source.samples


def test_padding_that_no_kept_row_needs_is_dropped() -> None:
    found, _ = take(texts([3, 9, 5, 12], per_batch=4), 14, None)
    (batch,) = found.batches
    assert kept(found) == [0, 2]
    assert batch.inputs["input_ids"].shape == batch.real.shape == (2, 5)
    assert batch.real.sum(1).tolist() == [3, 5]


def test_an_engine_gets_no_more_rows_and_no_other_lengths_than_it_takes() -> None:
    samples = texts([2, 3, 4, 6, 8, 9, 20, 30])
    found, cut = take(samples, 10_000, EngineShapes(rows=3, least=4, longest=8))
    assert [batch.real.shape for batch in found.batches] == [(3, 4), (1, 6), (3, 8), (1, 8)]
    assert cut == 3
    assert kept(found) == list(range(8))
    assert found.source.tokens == 2 + 3 + 4 + 6 + 4 * 8
    for batch in found.batches:
        assert batch.inputs["attention_mask"].equal(batch.real.long())


def test_an_image_counts_as_many_tokens() -> None:
    pixels = torch.arange(20.0).view(20, 1, 1, 1)
    batches = tuple(
        Batch({"pixel_values": part}, torch.ones(len(part), dtype=torch.bool))
        for part in pixels.split(8)
    )
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=20, tokens=20, unit="image")
    found, cut = take(
        Samples(batches=batches, source=source),
        5 * IMAGES.tokens,
        EngineShapes(rows=2, least=16, longest=16),
    )
    seen = torch.cat([batch.inputs["pixel_values"] for batch in found.batches]).flatten()
    assert seen.tolist() == [0, 4, 8, 12, 16]
    assert [len(batch.real) for batch in found.batches] == [2, 2, 1]
    assert (found.source.samples, found.source.tokens, cut) == (5, 5, 0)


def test_both_sides_of_a_pair_are_cut_and_only_the_text_is_padded() -> None:
    batch = pad_rows([[1] * 3, [2] * 12], NAMES, 0)
    fed = torch.tensor([[7, 8, 9, 9, 9, 0], [7, 8, 0, 0, 0, 0]])
    targets = torch.tensor([[8, 9, 9, 9, 9, 9], [8, 9, *[IGNORED] * 4]])
    batch = Batch(batch.inputs | {"decoder_input_ids": fed}, batch.real, targets)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=2, tokens=23, targets=2)
    found, cut = take(
        Samples(batches=(batch,), source=source), 10_000, EngineShapes(rows=1, least=4, longest=5)
    )
    first, second = found.batches
    assert (first.real.shape, second.real.shape) == ((1, 4), (1, 5))
    assert first.targets is not None
    assert second.targets is not None
    assert (first.targets.shape, second.targets.shape) == ((1, 5), (1, 2))
    assert first.inputs["decoder_input_ids"].tolist() == [[7, 8, 9, 9, 9]]
    assert cut == 2
    assert found.source.tokens == 3 + 5 + 5 + 2


def test_targets_of_what_is_no_text_are_cut_too() -> None:
    sounds = torch.arange(2 * 3 * 7.0).view(2, 3, 7)
    targets = torch.tensor([[IGNORED, 5, 6, 7, IGNORED], [IGNORED, 5, IGNORED, IGNORED, IGNORED]])
    inputs = {"input_features": sounds, "decoder_input_ids": torch.ones(2, 5, dtype=torch.long)}
    batch = Batch(inputs, torch.ones(2, dtype=torch.bool), targets)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=2, tokens=2, unit="image")
    found, cut = take(
        Samples(batches=(batch,), source=source), 10_000, EngineShapes(rows=2, least=8, longest=2)
    )
    (only,) = found.batches
    assert only.inputs["input_features"].equal(sounds)
    assert only.inputs["decoder_input_ids"].shape == (2, 2)
    assert only.targets is not None
    assert only.targets.tolist() == [[IGNORED, 5], [IGNORED, 5]]
    assert cut == 1


def test_behind_a_past_only_the_last_tokens_are_to_be_predicted() -> None:
    ids = torch.arange(1, 11).view(1, 10)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids > 0)
    short = Batch({"input_ids": ids[:, :3]}, ids[:, :3] > 0)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=2, tokens=13)
    found = behind_a_past(Samples(batches=(batch, short), source=source), 4)
    first, second = (one.targets for one in found.batches)
    assert first is not None
    assert second is not None
    assert first.tolist() == [[IGNORED] * 5 + [7, 8, 9, 10, IGNORED]]
    assert second.tolist() == [[2, 3, IGNORED]]
    assert (found.source.samples, found.source.tokens) == (2, 6)


def test_all_that_a_decoder_beside_an_encoder_writes_is_to_be_predicted() -> None:
    targets = torch.tensor([[5, 6, IGNORED], [7, 8, 9]])
    batch = Batch({"input_ids": torch.ones(2, 4)}, torch.ones(2, 4) > 0, targets)
    source = TextSource(kind="file", paths=("x",), sha256="0", samples=2, tokens=8)
    found = behind_a_past(Samples(batches=(batch,), source=source), 1)
    assert found.batches == (batch,)
    assert found.source.tokens == 5
