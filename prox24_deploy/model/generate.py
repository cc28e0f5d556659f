"""What a model of speech writes of recordings, and how much of it the pruned model gets wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError, ModelDirError
from prox24_deploy.core.records import Metric
from prox24_deploy.core.types import Progress
from prox24_deploy.data.text import Samples
from prox24_deploy.evaluation.evaluate import evaluate_text_generation, mean_estimate, per_sample
from prox24_deploy.evaluation.words import word_errors, words_of
from prox24_deploy.model.processors import open_tokenizer


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
            rows = write_down(model, batch.inputs["input_features"])
            written += [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
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
    rates = []
    if known:
        said = [str(transcripts[i]) for i in known]
        both = [
            _rate(said, [written[i] for i in known], "transcripts") for written in (dense, sparse)
        ]
        rates.append(
            Metric(
                "word error rate",
                False,
                len(known),
                mean_estimate(both[0]),
                mean_estimate(both[1]),
                mean_estimate(both[1] - both[0]),
                None,
                per_sample(both[1]),
            )
        )
    change = _rate(dense, sparse, "transcriptions of the dense model")
    rates.append(
        Metric(
            "word error rate to dense",
            False,
            len(change),
            None,
            None,
            None,
            mean_estimate(change),
            per_sample(change),
        )
    )
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


def start_tokens(model: nn.Module, features: Tensor) -> list[list[int]]:
    """What a model starts from on each recording: start token, and language and task if it has any.

    Args:
        model: of transformers.
        features: (recordings, mels, frames).

    Raises:
        ModelDirError: the generation_config.json of the model does not fit it.
    """
    found: list[list[int]] = _generate(model, features, 1)[:, :-1].tolist()
    return found


def write_down(model: nn.Module, features: Tensor) -> list[list[int]]:
    """Tokens that a model writes greedily of each recording, up to and with its end token.

    Other arguments and errors are those of `start_tokens`. As many tokens are written as the model
    has positions; a recording of which more would be written has no end token.
    """
    settings: Any = model.config
    start = len(start_tokens(model, features)[0])
    room = int(settings.max_target_positions) - start
    ends = torch.as_tensor(model.generation_config.eos_token_id).flatten()  # type: ignore[union-attr]
    rows = _generate(model, features, room)[:, start:].cpu()
    found = []
    for row in rows:
        ended = torch.isin(row, ends).nonzero()
        found.append(row[: int(ended[0]) + 1 if len(ended) else None].tolist())
    return found


@torch.no_grad()
def _generate(model: nn.Module, features: Tensor, tokens: int) -> Tensor:
    device = next(model.parameters()).device
    try:
        found: Tensor = model.generate(  # type: ignore[operator]  # a transformers model
            features.to(device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            return_timestamps=False,
            # Gives what the decoder started from, too.
            force_unique_generate_call=True,
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ModelDirError(
            f"The {type(model).__name__} cannot write down a recording ({reason}); restore its "
            "generation_config.json."
        ) from error
    return found
