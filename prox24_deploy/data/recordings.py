"""Recordings of speech: find them in folders or lists, with what is said in them, and read PCM.

Files in other formats and at other rates are read by `data.sound`. Channels are never mixed: what
that makes of a recording would be part of what is measured.
"""

import os
import struct
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prox24_deploy.core.documents import open_regular
from prox24_deploy.core.errors import CalibrationError
from prox24_deploy.data.split import Files, Search, hold_out, readable_files
from prox24_deploy.data.tables import TEXT_TABLES, read_table
from prox24_deploy.data.text_files import JSON_LINES, Record, read_records, read_text

MIN_RECORDINGS = 8
_WAVE = ".wav"
# What else is read where soundfile is installed, and what nothing here reads.
SOUNDS = frozenset({_WAVE, ".aiff", ".flac", ".mp3", ".ogg", ".opus"})
_OTHERS = frozenset({".aac", ".m4a", ".mp4", ".webm"})
_WIDTHS = (1, 2, 3, 4)
_FORM = '{"audio": "FILE.wav", "text": "..."}'
# Columns with the path of a recording; the second is that of audio folders of `datasets`.
_PATHS = ("audio", "file_name")
_LISTS = JSON_LINES | TEXT_TABLES.keys() | {".json"}
# In a folder, a table of this name is a list.
_METADATA = "metadata"

Samples1D = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Recording:
    """A file and what is said in it, None where nobody wrote that down."""

    path: Path
    text: str | None


Recordings = Files[Recording]


def read_recordings(
    calibration: Sequence[Path], evaluation: Sequence[Path], seed: int, column: str | None = None
) -> tuple[Recordings, Recordings]:
    """Return recordings to calibrate on and held-out ones, each in seeded order.

    A folder gives all its recordings, with the text of a list or of a .txt file beside each; a list
    is JSON, CSV or TSV with a path, relative to the list, and a text, in `column` or else "text",
    per record. Without `evaluation` a fifth of the recordings is held out.

    Raises:
        CalibrationError: nothing is given, something is missing or not of this form, or there are
            too few recordings.
    """
    if not calibration:
        raise CalibrationError(
            "Speech models have no built-in calibration data; pass --calibration FOLDER with at "
            f"least {MIN_RECORDINGS} recordings (.wav) of the model's own domain, each with its "
            "transcript in a .txt file beside it if the word error rate is to be measured."
        )
    find = partial(_recordings_of, column=column)
    search = Search(find, MIN_RECORDINGS, "recordings", sorted(SOUNDS))
    return hold_out(calibration, evaluation, seed, search)


def read_wave(path: Path, rate: int, seconds: float) -> Samples1D:
    """Samples in [-1, 1) of one recording, (samples,).

    Args:
        path: PCM of 8, 16, 24 or 32 bits in a WAV file.
        rate: that the model expects, per second.
        seconds: that the model hears at most.

    Raises:
        CalibrationError: the file cannot be read, or is not such a recording.
    """
    try:
        with open_regular(path) as stored, wave.open(stored, "rb") as file:
            form = file.getparams()
            size = os.fstat(stored.fileno()).st_size - stored.tell()
            _require_form(path, form.nchannels, form.framerate, rate, form.sampwidth)
            _require_length(path, form.nframes, form.sampwidth, size, seconds * rate, rate)
            data = file.readframes(form.nframes)
    except (OSError, EOFError, wave.Error, ValueError, RuntimeError, struct.error) as error:
        # A chunk that is longer than its file is a RuntimeError without words.
        reason = getattr(error, "strerror", None) or str(error) or "it ends too early"
        raise CalibrationError(
            f"Recording {path} cannot be read ({reason}), expected PCM in a WAV file; "
            f"{convert(rate)}."
        ) from error
    _require_bytes(path, len(data), form.nframes * form.sampwidth)
    return _as_floats(data, form.sampwidth)


def _require_form(path: Path, channels: int, found: int, rate: int, width: int) -> None:
    if channels != 1 or found != rate:
        raise CalibrationError(
            f"Recording {path} has {channels} channel(s) at {found} Hz, expected 1 at {rate} Hz, "
            f"and nothing is mixed or resampled here; {convert(rate)}."
        )
    if width not in _WIDTHS:
        raise CalibrationError(
            f"Recording {path} has {8 * width} bits a sample, expected 8, 16, 24 or 32; "
            f"{convert(rate)}."
        )


def _require_length(
    path: Path, samples: int, width: int, size: int, most: float, rate: int
) -> None:
    """Before they are read, for a header may say any length."""
    if samples * width > size:
        _require_bytes(path, size, samples * width)
    if samples > most:
        raise CalibrationError(
            f"Recording {path} is {samples / rate:.1f} s long, more than the {most / rate:g} s "
            "that the model hears at once; cut it at a pause."
        )


def _require_bytes(path: Path, found: int, expected: int) -> None:
    if not found or found != expected:
        raise CalibrationError(
            f"Recording {path} holds {found} of {expected} bytes of sound; record or copy it again."
        )


def _as_floats(data: bytes, width: int) -> Samples1D:
    """Integers of any width as the upper bytes of 32 bits, as a part of their range."""
    stored = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(stored), 4), np.uint8)
    # One byte is unsigned, all others are signed.
    wide[:, 4 - width :] = stored ^ 0x80 if width == 1 else stored
    return (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)


def convert(rate: int) -> str:
    """What to do about a recording that cannot be read as it is, as a sentence ends."""
    return f"convert it, for example with ffmpeg -i IN -ac 1 -ar {rate} -c:a pcm_s16le OUT.wav"


def _recordings_of(path: Path, column: str | None) -> list[Recording]:
    if path.suffix.lower() in _LISTS and not path.is_dir():
        return list(_listed(path, column))
    if not path.is_dir():
        raise CalibrationError(
            f"Recordings {path} is neither a folder nor a list ({', '.join(sorted(_LISTS))}); pass "
            "a folder of recordings."
        )
    files = readable_files(path)
    if other := next((file for file in files if file.suffix.lower() in _OTHERS), None):
        raise CalibrationError(
            f"Recording {other} is in a format that is not read here; convert it, for example to "
            "FLAC, or move it elsewhere."
        )
    known = {
        one.path.resolve(): one.text
        for file in files
        if _is_list(file)
        for one in _listed(file, column)
    }
    sounds = [file for file in files if file.suffix.lower() in SOUNDS]
    return [Recording(file, known.get(file.resolve()) or _text_beside(file)) for file in sounds]


def _is_list(file: Path) -> bool:
    """Whether a file in a folder lists recordings: any JSONL, and a table called metadata."""
    suffix = file.suffix.lower()
    return suffix in JSON_LINES or (suffix in TEXT_TABLES and file.stem == _METADATA)


def _text_beside(file: Path) -> str | None:
    beside = file.with_suffix(".txt")
    if not beside.is_file():
        return None
    return _required(read_text(beside), f"Transcript {beside}")


def _listed(path: Path, column: str | None) -> Iterator[Recording]:
    """The recordings of a list, in its order."""
    for record in read_table(path, lambda names: names) or read_records(path):
        where = f"{path} {record.where}"
        fields = record.value if isinstance(record.value, dict) else {}
        name = next((fields[key] for key in _PATHS if key in fields), None)
        if not isinstance(name, str):
            raise CalibrationError(
                f'{where} has no string "audio"; expected {_FORM} per {record.unit}.'
            )
        if not (path.parent / name).is_file():
            raise CalibrationError(
                f"{where} names recording {name!r}, which is not there; correct it."
            )
        yield Recording(path.parent / name, _transcript(record, fields, column, where))


def _transcript(
    record: Record, fields: dict[str, Any], column: str | None, where: str
) -> str | None:
    if column is not None and column not in fields:
        raise CalibrationError(
            f"{where} has no column {column!r} but {', '.join(map(repr, fields))}; pass one of "
            "them as --column."
        )
    text = fields.get(column or "text")
    # A table says nothing by an empty cell.
    if text is None or (record.unit == "row" and text == ""):
        return None
    return _required(text, f"The text of {where}")


def _required(text: object, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(
            f"{where} is {text!r}, expected what is said in the recording; write it, or leave it "
            "out."
        )
    return text.strip()
