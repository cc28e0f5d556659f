"""Let espeak-ng speak sentences of CPython's documentation into WAV files with transcripts.

    python speak.py OUT COUNT

Needs the program `espeak-ng` and the package `soxr`. A machine's voice is no stand-in for that of
your users: calibrate a release on recordings of its own domain.
"""

import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import soxr

RATE = 16_000  # what Whisper hears
WORDS = range(8, 25)


def sentences() -> Iterator[str]:
    """Those of nothing but words, so that what is said is what is written."""
    seen = set()
    for text in topics.values():
        for found in re.findall(r"(?<=\. )[A-Z][a-z ,\n]+\.", re.sub(r"\s+", " ", text)):
            if len(found.split()) in WORDS and found not in seen:
                seen.add(found)
                yield found


def speak(text: str, path: Path) -> None:
    """One channel of 16-bit numbers at `RATE`."""
    command = ["espeak-ng", "-v", "en-us", "-s", "150", "-w", str(path), text]
    subprocess.run(command, check=True)
    with wave.open(str(path)) as read:
        rate, data = read.getframerate(), read.readframes(read.getnframes())
    samples = soxr.resample(np.frombuffer(data, dtype=np.int16), rate, RATE)
    with wave.open(str(path), "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes(samples.tobytes())


def main(out: Path, count: int) -> None:
    """Write NUMBER.wav and NUMBER.txt."""
    out.mkdir(parents=True, exist_ok=True)
    said = list(sentences())[:count]
    if len(said) < count:
        raise SystemExit(f"{count} recordings asked for, but there are {len(said)} sentences")
    for i, text in enumerate(said):
        speak(text, out / f"{i:03}.wav")
        (out / f"{i:03}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]))
