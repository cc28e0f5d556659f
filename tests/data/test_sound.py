"""Recordings of other formats and rates are decoded and resampled, or the extra is named."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_wave

from prox24_deploy.core.errors import BackendMissingError, CalibrationError
from prox24_deploy.data.recordings import read_recordings, read_wave
from prox24_deploy.data.sound import read_sound

HZ = 8000
TONE = np.sin(2 * np.pi * 440 * np.arange(HZ // 2) / HZ)


@pytest.fixture
def soundfile() -> Any:
    pytest.importorskip("soxr", reason="the extra speech is not installed")
    return pytest.importorskip("soundfile", reason="the extra speech is not installed")


def whole(samples: Any) -> list[int]:
    return [int(value) for value in np.round(samples * 30_000)]


@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.ogg"])
def test_what_soundfile_decodes_is_the_same_sound(
    tmp_path: Path, soundfile: Any, name: str
) -> None:
    path = tmp_path / name
    kind = {"a.wav": "FLOAT", "a.flac": "PCM_24", "a.ogg": "VORBIS"}[name]
    soundfile.write(path, TONE, HZ, subtype=kind)
    found = read_sound(path, HZ, 1.0)
    assert found.dtype == np.float32
    assert np.abs(found - TONE[: len(found)]).max() < (0.05 if kind == "VORBIS" else 1e-5)


@pytest.mark.parametrize("rate", [4000, 11025, 44100])
def test_another_rate_is_converted(tmp_path: Path, soundfile: Any, rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)
    path = write_wave(tmp_path / "a.wav", whole(tone), rate=rate)
    found = read_sound(path, HZ, 1.0)
    assert len(found) == HZ // 2
    # But for the ends, where nothing is known of what went before.
    assert np.abs(found - TONE * 30_000 / 2**15)[400:-400].max() < 2e-3


def test_pcm_at_the_rate_of_the_model_is_taken_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = write_wave(tmp_path / "a.wav", whole(TONE), rate=HZ)
    assert read_sound(path, HZ, 1.0).tolist() == read_wave(path, HZ, 1.0).tolist()


def test_the_extra_is_named_where_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    path = write_wave(tmp_path / "a.wav", whole(TONE), rate=44100)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    for file in (path, tmp_path / "a.flac"):
        with pytest.raises(
            BackendMissingError, match=r"no PCM in a WAV file at 8000 Hz, and .* or ins"
        ) as found:
            read_sound(file, HZ, 1.0)
        assert str(found.value).endswith("pip install 'prox24-deploy[speech]'")


def test_sound_that_does_not_fit_is_refused(tmp_path: Path, soundfile: Any) -> None:
    path = tmp_path / "a.flac"
    cases = [
        (np.stack([TONE, TONE], 1), HZ, r"has 2 channel\(s\) at 8000 Hz, expected 1 at 4000 to"),
        (TONE, 1000, r"has 1 channel\(s\) at 1000 Hz, expected 1 at 4000 to 400000 Hz"),
        (
            np.tile(TONE, 3),
            HZ,
            r"is 1\.5 s long, more than the 1 s that the model hears at once; c",
        ),
    ]
    for samples, rate, message in cases:
        soundfile.write(path, samples, rate)
        with pytest.raises(CalibrationError, match=message):
            read_sound(path, HZ, 1.0)
    soundfile.write(tmp_path / "a.wav", TONE[:0], HZ, subtype="FLOAT")
    with pytest.raises(CalibrationError, match=r"holds no sound; record or copy it again\.$"):
        read_sound(tmp_path / "a.wav", HZ, 1.0)
    path.write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(
        CalibrationError, match=r"a\.flac cannot be read \(.*\); convert it, for exam"
    ):
        read_sound(path, HZ, 1.0)
    with pytest.raises(CalibrationError, match=r"b\.flac cannot be read \(No such file or direc"):
        read_sound(tmp_path / "b.flac", HZ, 1.0)


def test_lists_are_tables_too(tmp_path: Path) -> None:
    for i in range(8):
        write_wave(tmp_path / f"{i}.wav", [i])
    (tmp_path / "7.flac").write_bytes(b"fLaC")
    rows = [f"{i}.wav,said {i},geschrieben {i}" for i in range(7)]
    table = "\n".join(["file_name,text,other", *rows, "7.wav,,"])
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    (tmp_path / "others.csv").write_text("file_name\ngone.wav\n", encoding="utf-8")
    expected = {f"{i}.wav": f"said {i}" for i in range(7)} | {"7.wav": None}
    for path, count in ((tmp_path, 9), (tmp_path / "metadata.csv", 8)):
        found, _ = read_recordings([path], [path], 0)
        texts = {one.path.name: one.text for one in found.files}
        assert len(texts) == count
        assert {name: texts[name] for name in expected} == expected
    other, _ = read_recordings([tmp_path / "metadata.csv"], [tmp_path], 0, "other")
    assert {one.text for one in other.files} == {f"geschrieben {i}" for i in range(7)} | {None}
    with pytest.raises(CalibrationError, match=r"row 1 has no column 'x' but 'file_name', 'text',"):
        read_recordings([tmp_path / "metadata.csv"], [], 0, "x")
