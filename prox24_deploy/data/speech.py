"""Recordings and transcripts to batches of an encoder-decoder that hears speech.

The decoder is forced along the transcript of each recording behind what the dense model itself
starts from: start token, and the language and task that it hears. A recording without a transcript
takes that of the dense model, which the pruned one is to repeat.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prox24_deploy.core.errors import CalibrationError, ModelDirError
from prox24_deploy.core.foreign import blamed
from prox24_deploy.core.modalities import RECORDINGS
from prox24_deploy.core.records import TextSource
from prox24_deploy.core.types import Progress
from prox24_deploy.data.recordings import Recording, Recordings, Samples1D
from prox24_deploy.data.sound import read_sound
from prox24_deploy.data.tokens import enough_of
from prox24_deploy.evaluation.words import spellers_of
from prox24_deploy.model.batch import IGNORED, Batch, Samples, pad_rows, padding_id
from prox24_deploy.model.directory import ModelDir
from prox24_deploy.model.generate import start_tokens, write_down
from prox24_deploy.model.tokenizing import ids_of, text_of

# Thirty seconds are 1500 positions of an encoder; two recordings hold a little more than
# `BATCH_TOKENS` of text.
_BATCH_RECORDINGS = 2
# How many frames the stem of the encoder makes one position of.
_STRIDE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """The dense model and how recordings and texts are prepared for it.

    Attributes:
        directory: where it is from.
        model: that writes down what it hears.
        extractor: from samples to `input_features`, (recordings, mels, frames).
        tokenizer: of what it writes.
    """

    directory: ModelDir
    model: nn.Module
    extractor: Any
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class _Heard:
    """Some recordings: features, and what the decoder starts from and should write on each."""

    features: Tensor
    starts: list[list[int]]
    texts: list[list[int]]


def feature_sizes(config: dict[str, Any]) -> dict[str, int]:
    """Mels and frames that the encoder of a model hears, and "source" positions that it gives.

    Raises:
        ModelDirError: config.json does not say.
    """
    mels, source = (config.get(key) for key in ("num_mel_bins", "max_source_positions"))
    if not isinstance(mels, int) or not isinstance(source, int):
        raise ModelDirError(
            f"config.json has num_mel_bins {mels!r} and max_source_positions {source!r}, expected "
            "two integers; restore it."
        )
    return {"mels": mels, "frames": _STRIDE * source, "source": source}


def make_speech_samples(
    recordings: Recordings, listener: Listener, *, limit: int, progress: Progress
) -> Samples:
    """Read at most `limit` recordings, and have those written down that came without a transcript.

    `progress` is called with ("listen", done, total).

    Raises:
        CalibrationError: a recording cannot be used, or its transcript is too long for the model.
        ModelDirError: the feature extractor or generation_config.json does not fit the model.
    """
    files = recordings.files[:limit]
    digest = hashlib.sha256()
    batches = []
    done = words = 0
    for group in _groups(files):
        progress("listen", done, len(files))
        heard = _hear(group, listener)
        digest.update(heard.features.numpy().tobytes())
        digest.update(json.dumps([heard.starts, heard.texts]).encode())
        batches.append(_batch(heard, padding_id(listener.tokenizer)))
        texts = [text_of(text, listener.tokenizer) for text in heard.texts]
        spellers = spellers_of(heard.starts, listener.tokenizer)
        words += sum(len(one.words(text)) for one, text in zip(spellers, texts, strict=True))
        done += len(texts)
    progress("listen", len(files), len(files))
    if not words:
        raise CalibrationError(
            f"{', '.join(recordings.paths)}: the dense model writes no word of any of "
            f"{len(files)} recordings; pass recordings of speech that it understands."
        )
    transcripts = tuple(file.text for file in files)
    digest.update(json.dumps(transcripts).encode())
    source = TextSource(
        kind=recordings.kind,
        paths=recordings.paths,
        sha256=digest.hexdigest(),
        samples=len(files),
        tokens=len(files),
        unit=RECORDINGS.unit,
        targets=sum(text is not None for text in transcripts),
    )
    return Samples(batches=tuple(batches), source=source, transcripts=transcripts)


def _groups(files: Sequence[Recording]) -> Iterator[Sequence[Recording]]:
    for start in range(0, len(files), _BATCH_RECORDINGS):
        yield files[start : start + _BATCH_RECORDINGS]


def _features(listener: Listener, waves: Sequence[Samples1D], rate: int) -> Tensor:
    """What the model reads of recordings, (recordings, mels, frames)."""

    def refused(reason: str) -> ModelDirError:
        return ModelDirError(
            f"The feature extractor of {listener.directory.path} cannot prepare a recording "
            f"({reason}); restore its preprocessor_config.json."
        )

    with blamed(refused):
        made = listener.extractor(waves, sampling_rate=rate, return_tensors="pt")
        features: Tensor = made[RECORDINGS.input]
        return features


def _hear(files: Sequence[Recording], listener: Listener) -> _Heard:
    rate, seconds = _hearing(listener)
    waves = [read_sound(file.path, rate, seconds) for file in files]
    features = _features(listener, waves, rate)
    sizes = feature_sizes(listener.directory.config)
    if features.shape[1:] != (expected := (sizes["mels"], sizes["frames"])):
        raise ModelDirError(
            f"The feature extractor of {listener.directory.path} makes features of shape "
            f"{tuple(features.shape[1:])}, but config.json asks for {expected}; restore the "
            "matching preprocessor_config.json."
        )
    starts = start_tokens(listener.model, features)
    own = [i for i, file in enumerate(files) if file.text is None]
    written = dict(zip(own, write_down(listener.model, features[own]), strict=True)) if own else {}
    texts = [
        written[i] if file.text is None else _tokens(file, file.text, len(start), listener)
        for i, (file, start) in enumerate(zip(files, starts, strict=True))
    ]
    return _Heard(features, starts, texts)


def _hearing(listener: Listener) -> tuple[int, float]:
    """Samples a second, and the most seconds, that the feature extractor takes."""
    rate, seconds = (
        getattr(listener.extractor, name, None) for name in ("sampling_rate", "chunk_length")
    )
    if not isinstance(rate, int) or not isinstance(seconds, int | float):
        raise ModelDirError(
            f"The {type(listener.extractor).__name__} of {listener.directory.path} has sampling "
            f"rate {rate!r} and chunk length {seconds!r}, expected two numbers as those of a "
            "WhisperFeatureExtractor; restore preprocessor_config.json."
        )
    return rate, seconds


def _tokens(file: Recording, text: str, start: int, listener: Listener) -> list[int]:
    """Tokens of a transcript with the end token, which must fit behind those it starts from."""
    tokenizer = listener.tokenizer
    settings: Any = listener.model.config
    positions = int(settings.max_target_positions)
    part = enough_of(text, tokenizer, positions)
    tokens = [*ids_of(part, tokenizer, special=False), _end(listener)]
    room = positions - start
    if len(tokens) > room:
        raise CalibrationError(
            f"The transcript of recording {file.path} has {len(tokens)} tokens, more than the "
            f"{room} that the model writes at most; cut the recording."
        )
    return tokens


def _end(listener: Listener) -> int:
    """The token that ends a transcript."""
    end = listener.tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelDirError(
            f"The tokenizer of {listener.directory.path} has no eos_token to end a transcript "
            "with; add it to tokenizer_config.json."
        )
    return end


def _batch(heard: _Heard, padding: int) -> Batch:
    rows = [[*start, *text] for start, text in zip(heard.starts, heard.texts, strict=True)]
    fed = pad_rows([row[:-1] for row in rows], ["input_ids"], padding)
    width = fed.real.shape[1]
    targets = []
    for start, text in zip(heard.starts, heard.texts, strict=True):
        # Language and task are given, not predicted.
        row = [IGNORED] * (len(start) - 1) + text
        targets.append(row + [IGNORED] * (width - len(row)))
    inputs = {RECORDINGS.input: heard.features, "decoder_input_ids": fed.inputs["input_ids"]}
    real = torch.ones(len(rows), dtype=torch.bool)
    return Batch(inputs, real, torch.tensor(targets))
