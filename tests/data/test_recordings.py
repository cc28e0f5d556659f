"""Recordings are found with their transcripts, and what is no such recording is refused."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_wave

from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.data.recordings import Recording, read_recordings, read_wave

HZ = 8000


def write_many(folder: Path, count: int = 10) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        write_wave(folder / f"{i}.wav", [i, -i])
    return folder


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_are_parts_of_the_range_of_their_width(width: int, tmp_path: Path) -> None:
    top = 2 ** (8 * width - 1)
    path = write_wave(tmp_path / "a.wav", [0, top // 2, -top, top - 1], rate=HZ, width=width)
    found = read_wave(path, HZ, 1.0)
    assert found.dtype == np.float32
    expected = np.array([0, 0.5, -1, (top - 1) / top], np.float32)
    assert found.tolist() == expected.tolist()


def test_a_folder_gives_its_recordings_with_the_texts_beside_them(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "in")
    write_many(folder / "more", 2)
    (folder / "3.txt").write_text(" three \n", encoding="utf-8-sig")
    (folder / "more" / "list.jsonl").write_text(json.dumps({"audio": "1.wav", "text": "uno"}))
    (folder / "notes.md").write_text("no recording")
    calibration, held_out = read_recordings([folder], [], 0)
    assert (calibration.kind, held_out.kind) == ("file", "split")
    assert (len(calibration.files), len(held_out.files)) == (10, 2)
    texts = {one.path: one.text for one in (*calibration.files, *held_out.files) if one.text}
    assert texts == {folder / "3.wav": "three", folder / "more" / "1.wav": "uno"}
    assert read_recordings([folder], [], 0) == (calibration, held_out)
    assert read_recordings([folder], [], 1) != (calibration, held_out)


def test_a_list_gives_its_recordings_and_evaluation_is_used_whole(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "in")
    file = tmp_path / "list.jsonl"
    lines = [json.dumps({"audio": f"in/{i}.wav", "text": f"t{i}"}) for i in range(8)]
    file.write_text("\n".join([*lines, json.dumps({"audio": "in/9.wav"}), ""]), encoding="utf-8")
    calibration, held_out = read_recordings([folder], [file], 0)
    assert held_out.kind == "file"
    expected = {Recording(folder / f"{i}.wav", f"t{i}") for i in range(8)}
    assert set(held_out.files) == expected | {Recording(folder / "9.wav", None)}
    assert len(calibration.files) == 10


def raw_wave(
    _: Path,
    *,
    form: int = 1,
    channels: int = 1,
    rate: int = HZ,
    bits: int = 16,
    data: bytes = bytes(8),
    length: int | None = None,
) -> bytes:
    """A WAV file whose header says what it is told to."""
    width = (bits + 7) // 8 * channels
    said = struct.pack("<HHIIHH", form, channels, rate, rate * width, width, bits)
    size = len(data) if length is None else length
    chunks = b"fmt " + struct.pack("<I", len(said)) + said + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVE" + chunks + data


CONVERT = r"convert it, for example with ffmpeg -i IN -ac 1 -ar 8000 -c:a pcm_s16le OUT\.wav\.$"
WAVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no sound file": (
        lambda path: path.write_bytes(b"ID3 and so on"),
        rf"a\.wav cannot be read \(.*\), expected PCM in a WAV file; {CONVERT}",
    ),
    "nothing": (
        lambda path: path.write_bytes(b""),
        rf"a\.wav cannot be read \(it ends too early\), expected PCM .*; {CONVERT}",
    ),
    "a rate of its own": (
        lambda path: write_wave(path, [0], rate=44100),
        rf"a\.wav has 1 channel\(s\) at 44100 Hz, expected 1 at 8000 Hz, and .*; {CONVERT}",
    ),
    "stereo": (
        lambda path: write_wave(path, [0, 0], rate=HZ, channels=2),
        rf"a\.wav has 2 channel\(s\) at 8000 Hz, expected 1 at 8000 Hz, and .*; {CONVERT}",
    ),
    "no sound": (
        lambda path: write_wave(path, [], rate=HZ),
        r"a\.wav holds 0 of 0 bytes of sound; record or copy it again\.$",
    ),
    "cut short": (
        lambda path: path.write_bytes(write_wave(path, [0] * 9, rate=HZ).read_bytes()[:-5]),
        r"a\.wav holds 13 of 18 bytes of sound; record or copy it again\.$",
    ),
    "wider samples than are read": (
        lambda path: path.write_bytes(raw_wave(path, bits=40, data=bytes(10))),
        rf"a\.wav has 40 bits a sample, expected 8, 16, 24 or 32; {CONVERT}",
    ),
    "samples of 64 bits": (
        lambda path: path.write_bytes(raw_wave(path, bits=64, data=bytes(16))),
        rf"a\.wav has 64 bits a sample, expected 8, 16, 24 or 32; {CONVERT}",
    ),
    "floats": (
        lambda path: path.write_bytes(raw_wave(path, bits=32, form=3, data=bytes(16))),
        rf"a\.wav cannot be read \(unknown format: 3\), expected PCM in a WAV file; {CONVERT}",
    ),
    "no channel": (
        lambda path: path.write_bytes(raw_wave(path, channels=0)),
        rf"a\.wav cannot be read \(bad # of channels\), expected PCM in a WAV file; {CONVERT}",
    ),
    "no rate": (
        lambda path: path.write_bytes(raw_wave(path, rate=0)),
        rf"a\.wav has 1 channel\(s\) at 0 Hz, expected 1 at 8000 Hz, and .*; {CONVERT}",
    ),
    "no bits": (
        lambda path: path.write_bytes(raw_wave(path, bits=0)),
        rf"a\.wav cannot be read \(bad sample width\), expected PCM in a WAV file; {CONVERT}",
    ),
    "a length of gigabytes that is not there": (
        lambda path: path.write_bytes(raw_wave(path, length=2**32 - 2)),
        r"a\.wav holds 8 of 4294967294 bytes of sound; record or copy it again\.$",
    ),
    "a pipe": (
        os.mkfifo,
        rf"a\.wav cannot be read \(it is a pipe, expected a file\), expected PCM .*; {CONVERT}",
    ),
    "a folder": (
        lambda path: path.mkdir(),
        rf"a\.wav cannot be read \(Is a directory\), expected PCM in a WAV file; {CONVERT}",
    ),
    "too long": (
        lambda path: write_wave(path, [0] * (2 * HZ + 1), rate=HZ),
        r"a\.wav is 2\.0 s long, more than the 2 s that the model hears at once; cut it at a p",
    ),
}


@pytest.mark.parametrize("kind", WAVES)
def test_what_is_no_such_recording_is_refused(kind: str, tmp_path: Path) -> None:
    write, message = WAVES[kind]
    write(tmp_path / "a.wav")
    with pytest.raises(CalibrationError, match=message):
        read_wave(tmp_path / "a.wav", HZ, 2.0)


@settings(max_examples=150)
@given(noise=st.binary(max_size=60), place=st.integers(0, 60), whole=st.booleans())
def test_any_bytes_are_a_recording_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int, *, whole: bool
) -> None:
    """Noise alone, and over a part of a sound file."""
    path = tmp_path_factory.getbasetemp() / "any.wav"
    sound = raw_wave(path)
    path.write_bytes(noise if whole else sound[:place] + noise + sound[place + len(noise) :])
    try:
        found = read_wave(path, HZ, 2.0)
    except CalibrationError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert len(found) > 0
        assert bool((abs(found) <= 1).all())
    assert not refusal or (str(path) in refusal and refusal.endswith("."))


def test_a_recording_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read \(No such file or directory\)"):
        read_wave(tmp_path / "a.wav", HZ, 2.0)


def test_too_few_recordings_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"^Speech models have .*; pass --calibration FOLD"):
        read_recordings([], [], 0)
    with pytest.raises(CalibrationError, match=r"nowhere is neither a folder nor a list"):
        read_recordings([tmp_path / "nowhere"], [], 0)
    with pytest.raises(CalibrationError, match=r"holds 0 recordings, expected at least 8 \(\.aiff"):
        read_recordings([tmp_path], [], 0)


def test_a_recording_in_another_format_is_named(tmp_path: Path) -> None:
    folder = write_many(tmp_path / "in")
    (folder / "x.M4A").write_bytes(b"ftyp")
    with pytest.raises(CalibrationError, match=r"x\.M4A is in a format that is not read here; con"):
        read_recordings([folder], [], 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"list\.jsonl line 1 is not JSON \(.*\)\.$"),
        (b'{"text": "x"}', r'list\.jsonl line 1 has no string "audio"; expected \{"audio": "FILE'),
        (b"[7]", r'list\.jsonl item 1 has no string "audio"'),
        (b'{"audio": "b.wav"}', r"line 1 names recording 'b\.wav', which is not there; correct it"),
        (b'{"audio": "0.wav", "text": 7}', r"The text of .* line 1 is 7, expected what is said in"),
        (b'{"audio": "0.wav", "text": " "}', r"The text of .* line 1 is ' ', expected what is sai"),
        (b"\xff", r"list\.jsonl is not UTF-8, see byte 0; convert it\.$"),
    ],
)
def test_a_list_that_says_nothing_is_refused(line: bytes, message: str, tmp_path: Path) -> None:
    folder = write_many(tmp_path / "in")
    (folder / "list.jsonl").write_bytes(line)
    with pytest.raises(CalibrationError, match=message):
        read_recordings([folder / "list.jsonl"], [], 0)


def test_texts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"gone\.jsonl cannot be read \(No such file"):
        read_recordings([tmp_path / "gone.jsonl"], [], 0)
    folder = write_many(tmp_path / "in")
    (folder / "0.txt").write_text("\n")
    with pytest.raises(CalibrationError, match=r"Transcript .*0\.txt is '\\n', expected what is s"):
        read_recordings([folder], [], 0)
