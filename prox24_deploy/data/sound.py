"""Read the sound of a recording at the rate of a model: PCM as it is, all else by libsndfile.

PCM in a WAV file at the model's own rate needs no library and is taken bit by bit. Other formats
are decoded by soundfile (libsndfile), other rates converted by soxr in its default quality "HQ".
"""

import wave
from pathlib import Path

from prox24_deploy.core.documents import open_regular
from prox24_deploy.core.errors import BackendMissingError, CalibrationError
from prox24_deploy.core.extras import install_of
from prox24_deploy.core.foreign import blamed
from prox24_deploy.data.recordings import Samples1D, convert, read_wave

# Of speech; a header may say any rate, and one far off would take hours and gigabytes to convert.
_RATES = range(4_000, 400_000)


def read_sound(path: Path, rate: int, seconds: float) -> Samples1D:
    """Samples of one recording at `rate`, (samples,), within [-1, 1] but for what resampling adds.

    Args:
        path: the recording.
        rate: that the model expects, per second.
        seconds: that the model hears at most.

    Raises:
        CalibrationError: the file cannot be read, or has several channels or too much sound.
        BackendMissingError: it takes soundfile and soxr, and they are not installed.
    """
    if _is_plain(path, rate):
        return read_wave(path, rate, seconds)
    try:
        # An extra, which recordings in the form of the model do without.
        import soundfile
        import soxr
    except (ImportError, OSError) as error:
        raise BackendMissingError(
            f"Recording {path} is no PCM in a WAV file at {rate} Hz, and soundfile and soxr, which "
            f"read others, are not installed ({error}); {convert(rate)}, or install them with: "
            f"{install_of('speech')}"
        ) from error
    try:
        with (
            open_regular(path) as stored,
            blamed(lambda why: _unread(path, why, rate)),
            soundfile.SoundFile(stored) as file,
        ):
            _require_usable(path, file.channels, file.samplerate, rate)
            _require_length(path, file.frames / file.samplerate, seconds)
            found: Samples1D = file.read(dtype="float32")
            if not len(found):
                raise CalibrationError(f"Recording {path} holds no sound; record or copy it again.")
            made: Samples1D = soxr.resample(found, file.samplerate, rate)
    except OSError as error:
        raise _unread(path, str(error.strerror), rate) from error
    # Rounding may add a sample to what lasts as long as the model hears.
    return made[: int(seconds * rate)]


def _is_plain(path: Path, rate: int) -> bool:
    """Whether it is a WAV file that `read_wave` reads, or refuses with what is wrong in it."""
    if path.suffix.lower() != ".wav":
        return False
    try:
        with open_regular(path) as stored, wave.open(stored, "rb") as file:
            return file.getframerate() == rate or file.getframerate() not in _RATES
    except wave.Error as error:
        return not str(error).startswith("unknown format")
    except Exception:  # whatever a header can do to this reader, `read_wave` tells
        return True


def _require_usable(path: Path, channels: int, found: int, rate: int) -> None:
    if channels != 1 or found not in _RATES:
        raise CalibrationError(
            f"Recording {path} has {channels} channel(s) at {found} Hz, expected 1 at "
            f"{_RATES.start} to {_RATES.stop} Hz, and channels are not mixed here; {convert(rate)}."
        )


def _require_length(path: Path, found: float, most: float) -> None:
    if found > most:
        raise CalibrationError(
            f"Recording {path} is {found:.1f} s long, more than the {most:g} s that the model "
            "hears at once; cut it at a pause."
        )


def _unread(path: Path, reason: str, rate: int) -> CalibrationError:
    return CalibrationError(f"Recording {path} cannot be read ({reason}); {convert(rate)}.")
