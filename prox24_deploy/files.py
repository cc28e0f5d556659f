"""Write files so that a reader, or a kill at any moment, never sees half of one."""

import os
import re
import uuid
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` with `data` at once, durably; missing parent folders are created.

    The temporary file lies beside `path`, because only a rename within one file system is atomic.

    Raises:
        OSError: the folder cannot be written or is full; `path` is then as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a kill during `write_atomic` leaves behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", name) is not None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
