"""Word error rates of what two models write of the same recordings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.metrics import WORD_ERRORS, WORD_ERRORS_TO_DENSE
from prox24_deploy.core.modalities import RECORDINGS
from prox24_deploy.core.records import Metric
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import direct, paired
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.evaluation.words import word_errors, words_of
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.generate import write_down
from prox24_deploy.model.processors import open_tokenizer
from prox24_deploy.model.tokenizing import text_of


def evaluate_speech(
    dense: nn.Module, sparse: nn.Module, held_out: Samples, model_dir: Path, progress: Progress
) -> tuple[Metric, ...]:
    """Word error rates of greedy transcriptions, then perplexity and agreement along the targets.

    Both models write freely, from a language that each hears for itself.

    Raises:
        CalibrationError: the dense model writes no word of any recording.
    """
    tokenizer = open_tokenizer(model_dir)
    forced = evaluate_text_generation(dense, sparse, held_out.batches, progress)
    texts: list[list[str]] = [[], []]
    for i, batch in enumerate(held_out.batches):
        progress("transcribe", i, len(held_out.batches))
        for model, written in zip((dense, sparse), texts, strict=True):
            rows = write_down(model, batch.inputs[RECORDINGS.input])
            written += [text_of(row, tokenizer) for row in rows]
    progress("transcribe", len(held_out.batches), len(held_out.batches))
    return *word_error_rates(texts[0], texts[1], held_out.transcripts), *forced


def word_error_rates(
    dense: Sequence[str], sparse: Sequence[str], transcripts: Sequence[str | None]
) -> tuple[Metric, ...]:
    """The rate of both against the transcripts that there are, and of the sparse against the dense.

    A rate is that of all recordings together, errors over words, so that long ones count for more.

    Raises:
        CalibrationError: there are no words to get wrong.
    """
    known = [i for i, text in enumerate(transcripts) if text is not None]
    rates: list[Metric] = []
    if known:
        said = [str(transcripts[i]) for i in known]
        both = [
            _rate(said, [written[i] for i in known], "transcripts") for written in (dense, sparse)
        ]
        rates.append(paired(WORD_ERRORS, *both))
    change = _rate(dense, sparse, "transcriptions of the dense model")
    rates.append(direct(WORD_ERRORS_TO_DENSE, change))
    return tuple(rates)


def _rate(references: Sequence[str], written: Sequence[str], what: str) -> Tensor:
    """(recordings,), float64, whose mean is errors over words, and its standard error theirs.

    To first order, for the rate is a ratio of two means (the delta method).
    """
    pairs = [
        (words_of(said), words_of(text)) for said, text in zip(references, written, strict=True)
    ]
    errors = torch.tensor([word_errors(*pair) for pair in pairs], dtype=torch.float64)
    words = torch.tensor([len(said) for said, _ in pairs], dtype=torch.float64)
    if not bool(words.any()):
        raise CalibrationError(
            f"The {what} of {len(pairs)} evaluation recordings hold no word, so no error rate can "
            "be told; pass recordings of speech."
        )
    rate = errors.sum() / words.sum()
    return rate + (errors - rate * words) / words.mean()
