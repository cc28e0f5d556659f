"""Files to calibrate on and files held out, found where the user says they are."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from prox24_deploy.core.documents import files_below
from prox24_deploy.core.errors import CalibrationError

Entry = TypeVar("Entry")

_HELD_OUT_SHARE = 0.2


# Without slots, for a frozen class with both cannot be made through an alias such as `Files[Path]`.
@dataclass(frozen=True)
class Files(Generic[Entry]):
    """Files before they are read.

    Attributes:
        kind: "file" for the user's own, "split" for a part held out of those to calibrate on.
        paths: folders and lists, as the user named them.
        files: in seeded order, each with what was found beside it.
    """

    kind: Literal["file", "split"]
    paths: tuple[str, ...]
    files: tuple[Entry, ...]


@dataclass(frozen=True)
class Search(Generic[Entry]):
    """How to find files: `find` those of one path, at least `least`, `what` they are, in words."""

    find: Callable[[Path], Sequence[Entry]]
    least: int
    what: str
    suffixes: Sequence[str]


def hold_out(
    calibration: Sequence[Path], evaluation: Sequence[Path], seed: int, search: Search[Entry]
) -> tuple[Files[Entry], Files[Entry]]:
    """Files to calibrate on and held-out ones, each in seeded order.

    Without `evaluation` a fifth of those of `calibration` is held out.

    Raises:
        CalibrationError: there are too few files, or what `search.find` raises.
    """
    files = _shuffled(calibration, seed, search)
    paths = tuple(map(str, calibration))
    if evaluation:
        others = _shuffled(evaluation, seed, search)
        return Files("file", paths, files), Files("file", tuple(map(str, evaluation)), others)
    cut = len(files) - max(1, round(len(files) * _HELD_OUT_SHARE))
    return Files("file", paths, files[:cut]), Files("split", paths, files[cut:])


def readable_files(folder: Path) -> list[Path]:
    """What lies below a folder of the user's.

    Raises:
        CalibrationError: a folder in it cannot be read.
    """
    try:
        return files_below(folder)
    except OSError as error:
        raise CalibrationError(
            f"Folder {error.filename} cannot be read ({error.strerror}); make it readable."
        ) from error


def _shuffled(paths: Sequence[Path], seed: int, search: Search[Entry]) -> tuple[Entry, ...]:
    found = [entry for path in paths for entry in search.find(path)]
    if len(found) < search.least:
        raise CalibrationError(
            f"{', '.join(map(str, paths))} holds {len(found)} {search.what}, expected at least "
            f"{search.least} ({', '.join(search.suffixes)}); add some."
        )
    random.Random(seed).shuffle(found)
    return tuple(found)
