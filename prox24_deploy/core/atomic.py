"""Write files so that a reader, or a kill at any moment, never sees half of one."""

import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prox24_deploy.core.errors import WRITING, UsageError

_BLOCK = 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Note on an OSError that something was to be written, and what; see `errors.explained`."""
    try:
        yield
    except OSError as error:
        # Not under the name of a temporary file, which says nothing to anybody.
        error.filename = str(path)
        error.add_note(WRITING)
        raise


def make_folder(path: Path) -> None:
    """Make a folder with its parents, unless it is there.

    Raises:
        OSError: it cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file; an error tells whether it could not be read or not written.

    Raises:
        OSError: one of both.
    """
    with source.open("rb") as read:
        with writing(target):
            written = target.open("wb")
        with written:
            while block := read.read(_BLOCK):
                with writing(target):
                    written.write(block)
            with writing(target):
                written.close()


def require_absent(out: Path) -> None:
    """Refuse an output that is there, were it a link that leads nowhere.

    Raises:
        UsageError: it is.
    """
    if os.path.lexists(out):
        raise UsageError(f"Output {out} exists already; remove it, or pass another.")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be made, which takes its name at the end, durably.

    `out` must not be there. Where the work fails nothing is left of it.

    Raises:
        OSError: it cannot be written.
    """
    make_folder(out.parent)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        yield partial
        with writing(out):
            sync_tree(partial)
            partial.rename(out)
            sync_tree(out.parent, deep=False)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data` at once, durably; missing parent folders are created.

    The temporary file lies beside `path`, because only a rename within one file system is atomic.

    Raises:
        OSError: the folder cannot be written or is full; `path` is then as it was before.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def sync_tree(path: Path, *, deep: bool = True) -> None:
    """Make a file, or a folder and all that is in it, survive a power cut."""
    for each in _tree(path) if deep else [path]:
        _sync(each)


def make_readable(root: Path, name: str) -> None:
    """Let whoever may read `root` also read all that is at `root / name` in it.

    Some libraries write files that only their owner may read, which others then meet in a bundle.
    """
    granted = stat.S_IMODE(root.stat().st_mode) & 0o555
    for each in _tree(root / name):
        mode = stat.S_IMODE(each.stat().st_mode)
        wanted = mode | (granted if each.is_dir() else granted & 0o444)
        if wanted != mode:
            each.chmod(wanted)


def _tree(path: Path) -> Iterator[Path]:
    """A path, and what is below it where it is a folder; nothing where there is none, no links."""
    if path.is_symlink() or not path.exists():
        return
    yield path
    if path.is_dir():
        yield from (each for each in path.rglob("*") if not each.is_symlink())


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a kill during `write_atomic` leaves behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", name) is not None


def _sync(path: Path) -> None:
    """Flush a file, or a folder with the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
