"""Files as they were when they were hashed, and whether they still are.

Files that a stage reads belong to others: a checkpoint may be replaced while it is pruned. What was
made from files counts only if they are the same after their last use.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

Listing = Callable[[Path], Iterable[Path]]
# Files that are hashed at a time, each on a core; more would wait for a disk.
_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """One file: its content, and a stamp that changes with every write or replacement.

    The stamp tells a file that was replaced and put back from one that was never touched. It is
    device, inode, size in bytes, and the times of the last change of content and of the inode in
    nanoseconds.
    """

    sha256: str
    stamp: tuple[int, int, int, int, int]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stamp[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The files that a listing finds below a folder, by their POSIX paths relative to it."""

    root: Path
    listing: Listing
    files: Mapping[str, FileState]

    def touched(self) -> str | None:
        """Name of a file that came, went or was written since; None if all are untouched.

        Reads no content, so it may be asked often.
        """
        names = _names(self.root, self.listing)
        if names != list(self.files):
            return min(set(names) ^ set(self.files))
        stamps = ((name, _stamp(self.root / name)) for name in names)
        return next((name for name, stamp in stamps if stamp != self.files[name].stamp), None)

    def changed(self) -> str | None:
        """As `touched`, and every file is hashed again."""
        if (name := self.touched()) is not None:
            return name
        try:
            contents = hashes_of(self.root / name for name in self.files)
        except FileNotFoundError as error:
            return str(error.filename)
        found = zip(self.files, contents, strict=True)
        return next((name for name, sha256 in found if sha256 != self.files[name].sha256), None)


def take_snapshot(root: Path, listing: Listing) -> Snapshot:
    """Hash every file that `listing(root)` finds.

    Raises:
        OSError: a file cannot be read.
    """
    # The stamps first: what is written while a file is hashed must not pass for what was hashed.
    stamps = {name: _stamp(root / name) for name in _names(root, listing)}
    there = {name: stamp for name, stamp in stamps.items() if stamp is not None}
    contents = hashes_of(root / name for name in there)
    files = {
        name: FileState(sha256=sha256, stamp=stamp)
        for (name, stamp), sha256 in zip(there.items(), contents, strict=True)
    }
    return Snapshot(root=root, listing=listing, files=files)


def sha256_of(path: Path) -> str:
    """sha256 of the content of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hashes_of(paths: Iterable[Path]) -> list[str]:
    """As `sha256_of`, of some files at a time: hashing takes a core longer than reading a disk.

    Raises:
        OSError: a file cannot be read; of the first of them.
    """
    with ThreadPoolExecutor(min(_AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(sha256_of, paths))


def _names(root: Path, listing: Listing) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in listing(root))


def _stamp(path: Path) -> tuple[int, int, int, int, int] | None:
    """None for a file that is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
