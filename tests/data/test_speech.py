"""Recordings become features and targets, on which the decoder of the dense model is forced."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import CPU
from tiny_models import RATE, write_recordings, write_tiny_whisper

from prox24_deploy.config.recipe import read_recipe
from prox24_deploy.core.errors import CalibrationError, ModelDirError
from prox24_deploy.data.recordings import Recording, Recordings, read_wave
from prox24_deploy.data.speech import Listener, feature_sizes, make_speech_samples
from prox24_deploy.evaluation.speech import evaluate_speech
from prox24_deploy.model.batch import IGNORED, Samples
from prox24_deploy.model.directory import load_model, open_model_dir
from prox24_deploy.model.generate import start_tokens, write_down
from prox24_deploy.model.processors import load_feature_extractor, load_tokenizer

WHISPER = read_recipe(Path(__file__).parents[2] / "export" / "whisper.toml")
START, END = 2, 0
SAID = "Hello, world"


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Listener:
    directory = open_model_dir(write_tiny_whisper(tmp_path_factory.mktemp("whisper") / "model"))
    model = load_model(directory, WHISPER, CPU)
    tokenizer = load_tokenizer(directory)
    return Listener(
        directory=directory,
        model=model,
        extractor=load_feature_extractor(directory.path),
        tokenizer=tokenizer,
    )


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Recordings:
    """Three, of which the second has a transcript."""
    folder = write_recordings(tmp_path_factory.mktemp("speech") / "in", 3)
    texts = (None, SAID, None)
    files = tuple(Recording(folder / f"{i}.wav", text) for i, text in enumerate(texts))
    return Recordings("file", (str(folder),), files)


def samples_of(recordings: Recordings, listener: Listener, limit: int = 9) -> Samples:
    return make_speech_samples(recordings, listener, limit=limit, progress=lambda *_: None)


def features(listener: Listener, recordings: Recordings) -> Any:
    waves = [read_wave(file.path, RATE, 1.0) for file in recordings.files]
    made = listener.extractor(waves, sampling_rate=RATE, return_tensors="pt")
    return made["input_features"]


def test_a_recording_is_its_transcript_or_what_the_dense_model_writes(
    listener: Listener, recordings: Recordings
) -> None:
    samples = samples_of(recordings, listener)
    assert (samples.source.samples, samples.source.tokens, samples.source.targets) == (3, 3, 1)
    assert (samples.source.unit, samples.transcripts) == ("recording", (None, SAID, None))
    expected = features(listener, recordings)
    found = torch.cat([batch.inputs["input_features"] for batch in samples.batches])
    assert found.equal(expected)
    greedy = listener.model.generate(  # type: ignore[operator]  # a transformers model
        expected, do_sample=False, max_new_tokens=23, force_unique_generate_call=True
    )
    own = listener.tokenizer(SAID)["input_ids"] + [END]
    rows = [
        (fed[i], batch.targets[i])
        for batch in samples.batches
        if batch.targets is not None
        for fed in [batch.inputs["decoder_input_ids"]]
        for i in range(len(fed))
    ]
    for i, (fed, targets) in enumerate(rows):
        wanted = own if i == 1 else greedy[i, 1:].tolist()
        assert targets[targets != IGNORED].tolist() == wanted
        assert fed[: len(wanted)].tolist() == [START, *wanted[:-1]]
    assert all(batch.real.tolist() == [True] * len(batch.real) for batch in samples.batches)


def test_what_the_model_starts_from_is_given_and_not_predicted(
    listener: Listener, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = listener.model.generation_config
    known = {
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 5, "<|de|>": 6},
        "task_to_id": {"transcribe": 7, "translate": 8},
        # As the published checkpoints have it: a language that is heard, then the task.
        "forced_decoder_ids": [[1, None], [2, 7]],
        "no_timestamps_token_id": 9,
    }
    for name, value in known.items():
        monkeypatch.setattr(settings, name, value, raising=False)
    heard = features(listener, recordings)
    starts = start_tokens(listener.model, heard)
    assert all(start[0] == START and start[1] in {5, 6} for start in starts)
    assert {tuple(start[2:]) for start in starts} == {(7, 9)}
    assert all(len(row) <= 24 - 4 for row in write_down(listener.model, heard))
    samples = samples_of(recordings, listener, 2)
    targets = samples.batches[0].targets
    assert targets is not None
    assert targets[:, :3].tolist() == [[IGNORED] * 3] * 2
    assert samples.batches[0].inputs["decoder_input_ids"][:, :4].tolist() == starts[:2]
    own = listener.tokenizer(SAID)["input_ids"] + [END]
    assert targets[1, 3 : 3 + len(own)].tolist() == own


def test_a_model_agrees_with_itself(listener: Listener, recordings: Recordings) -> None:
    samples = samples_of(recordings, listener)
    model = listener.model
    metrics = evaluate_speech(model, model, samples, listener.directory.path, lambda *_: None)
    assert [metric.name for metric in metrics] == [
        "word error rate", "word error rate to dense", "perplexity", "log-perplexity",
        "top-1 agreement", "KL divergence",
    ]  # fmt: skip
    known, change, _, _, agreement, divergence = metrics
    assert (known.samples, change.samples) == (1, 3)
    assert known.dense == known.sparse
    assert known.difference is not None
    assert known.difference.value == 0
    assert change.agreement is not None
    assert change.agreement.value == 0
    assert agreement.agreement is not None
    assert agreement.agreement.value == 1
    assert divergence.agreement is not None
    assert divergence.agreement.value == pytest.approx(0, abs=1e-6)


def test_a_transcript_longer_than_the_decoder_is_refused(
    listener: Listener, recordings: Recordings
) -> None:
    file = replace(recordings.files[0], text="twenty-three characters")
    with pytest.raises(CalibrationError, match=r"0\.wav has 24 tokens, more than the 23 that the"):
        samples_of(replace(recordings, files=(file,)), listener, 1)


def test_recordings_of_which_no_word_is_written_are_refused(
    listener: Listener, recordings: Recordings
) -> None:
    files = tuple(replace(file, text="...") for file in recordings.files)
    with pytest.raises(CalibrationError, match=r"the dense model writes no word of any of 3 rec"):
        samples_of(replace(recordings, files=files), listener)


def test_a_feature_extractor_of_another_model_is_refused(
    listener: Listener, recordings: Recordings
) -> None:
    config = {**listener.directory.config, "num_mel_bins": 16}
    other = replace(listener, directory=replace(listener.directory, config=config))
    with pytest.raises(
        ModelDirError, match=r"features of shape \(8, 20\), but config\.json asks for \(16, 20\)"
    ):
        samples_of(recordings, other)


def test_a_feature_extractor_that_hears_no_seconds_is_refused(
    listener: Listener, recordings: Recordings
) -> None:
    other = replace(listener, extractor=SimpleNamespace(sampling_rate=RATE))
    with pytest.raises(ModelDirError, match=r"^The SimpleNamespace of .* chunk length None, exp"):
        samples_of(recordings, other)


def test_a_model_that_cannot_write_is_refused(
    listener: Listener, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener.model.generation_config, "task", "sing", raising=False)
    monkeypatch.setattr(listener.model.generation_config, "is_multilingual", True, raising=False)
    with pytest.raises(ModelDirError, match=r"cannot write down a recording \(.*\); restore its c"):
        start_tokens(listener.model, features(listener, recordings))


@pytest.mark.parametrize("value", [[[2]], float("-inf"), "2", 10**30, {}])
def test_a_start_that_is_no_token_is_refused(
    value: object, listener: Listener, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener.model.generation_config, "decoder_start_token_id", value)
    with pytest.raises(ModelDirError, match=r"cannot write down a recording \(.*\); restore its c"):
        start_tokens(listener.model, features(listener, recordings))


def test_ends_that_are_no_tokens_are_refused(
    listener: Listener, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = features(listener, recordings)
    monkeypatch.setattr("prox24_deploy.model.generate.start_tokens", lambda *_: [[START]])
    monkeypatch.setattr(listener.model.generation_config, "eos_token_id", "</s>")
    with pytest.raises(ModelDirError, match=r"cannot write down a recording \(.*\); restore its c"):
        write_down(listener.model, heard)


def test_a_tokenizer_that_ends_no_text_is_refused(
    listener: Listener, recordings: Recordings
) -> None:
    other = replace(listener, tokenizer=copy.deepcopy(listener.tokenizer))
    other.tokenizer.eos_token = None
    with pytest.raises(ModelDirError, match=r"has no eos_token to end a transcript with; add it"):
        samples_of(recordings, other)


def test_a_configuration_without_sizes_is_refused() -> None:
    assert feature_sizes({"num_mel_bins": 80, "max_source_positions": 1500}) == {
        "mels": 80, "frames": 3000, "source": 1500,
    }  # fmt: skip
    with pytest.raises(ModelDirError, match=r"num_mel_bins 80 and max_source_positions None, exp"):
        feature_sizes({"num_mel_bins": 80})
