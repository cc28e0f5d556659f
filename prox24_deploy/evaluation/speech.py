"""Error rates, in words or characters, of what two models write of the same recordings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.core.metrics import (
    CHARACTER_ERRORS,
    CHARACTER_ERRORS_TO_DENSE,
    WORD_ERRORS,
    WORD_ERRORS_TO_DENSE,
)
from prox24_deploy.core.modalities import RECORDINGS
from prox24_deploy.core.records import Metric
from prox24_deploy.core.types import Progress
from prox24_deploy.evaluation.estimate import direct, paired
from prox24_deploy.evaluation.language import evaluate_text_generation
from prox24_deploy.evaluation.words import Speller, spellers_of
from prox24_deploy.model.batch import Samples
from prox24_deploy.model.generate import write_down
from prox24_deploy.model.processors import open_tokenizer
from prox24_deploy.model.tokenizing import text_of

# By whether characters are counted: the rate against transcripts, and the one to the dense model.
_KINDS = {
    False: (WORD_ERRORS, WORD_ERRORS_TO_DENSE),
    True: (CHARACTER_ERRORS, CHARACTER_ERRORS_TO_DENSE),
}
# Tokens that a decoder starts from, at most: start, language, task, no timestamps.
_START = 4


def evaluate_speech(
    dense: nn.Module, sparse: nn.Module, held_out: Samples, model_dir: Path, progress: Progress
) -> tuple[Metric, ...]:
    """Error rates of greedy transcriptions, then perplexity and agreement along the targets.

    Both models write freely, from a language that each hears for itself; they are compared in the
    one that the dense model started from when the samples were made.

    Raises:
        CalibrationError: the dense model writes no word of any recording.
    """
    tokenizer = open_tokenizer(model_dir)
    forced = evaluate_text_generation(dense, sparse, held_out.batches, progress)
    texts: list[list[str]] = [[], []]
    spellers: list[Speller] = []
    for i, batch in enumerate(held_out.batches):
        progress("transcribe", i, len(held_out.batches))
        for model, written in zip((dense, sparse), texts, strict=True):
            rows = write_down(model, batch.inputs[RECORDINGS.input])
            written += [text_of(row, tokenizer) for row in rows]
        starts = batch.inputs["decoder_input_ids"][:, :_START].tolist()
        spellers += spellers_of(starts, tokenizer)
    progress("transcribe", len(held_out.batches), len(held_out.batches))
    return *error_rates(texts[0], texts[1], held_out.transcripts, spellers), *forced


def error_rates(
    dense: Sequence[str],
    sparse: Sequence[str],
    transcripts: Sequence[str | None],
    spellers: Sequence[Speller],
) -> tuple[Metric, ...]:
    """The rate of both against the transcripts that there are, and of the sparse against the dense.

    A rate is that of all recordings together, errors over words, so that long ones count for more.
    Recordings in languages without spaces have rates of their own, errors over characters.

    Raises:
        CalibrationError: there are no words to get wrong.
    """
    rates: list[Metric] = []
    for characters, kinds in _KINDS.items():
        mine = [i for i, one in enumerate(spellers) if one.counts_characters == characters]
        if not mine:
            continue
        known = [i for i in mine if transcripts[i] is not None]
        if known:
            said = [str(text) for text in transcripts]
            both = (
                _rate(_counted(spellers, said, written, known), "transcripts")
                for written in (dense, sparse)
            )
            rates.append(paired(kinds[0], *both))
        pairs = _counted(spellers, dense, sparse, mine)
        rates.append(direct(kinds[1], _rate(pairs, "transcriptions of the dense model")))
    return tuple(rates)


def _counted(
    spellers: Sequence[Speller], said: Sequence[str], written: Sequence[str], chosen: Sequence[int]
) -> list[tuple[int, int]]:
    """Errors and words of each of the chosen recordings."""
    return [spellers[i].errors(said[i], written[i]) for i in chosen]


def _rate(counted: Sequence[tuple[int, int]], what: str) -> Tensor:
    """(recordings,), float64, whose mean is errors over words, and its standard error theirs.

    To first order, for the rate is a ratio of two means (the delta method).
    """
    errors, words = torch.tensor(counted, dtype=torch.float64).unbind(1)
    if not bool(words.any()):
        raise CalibrationError(
            f"The {what} of {len(counted)} evaluation recordings hold no word, so no error rate "
            "can be told; pass recordings of speech."
        )
    rate = errors.sum() / words.sum()
    return rate + (errors - rate * words) / words.mean()
