"""Files are hashed several at a time, each under its own name."""

import hashlib
from pathlib import Path

import pytest

from prox24_deploy.core.snapshot import hashes_of, take_snapshot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        (tmp_path / f"{i:02d}").write_bytes(bytes([i]) * (1 + (40 - i) * 10_000))
    return tmp_path


def listing(root: Path) -> list[Path]:
    return list(root.iterdir())


def test_every_file_has_its_own_hash(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert hashes_of(paths) == expected
    snapshot = take_snapshot(folder, listing)
    assert [state.sha256 for state in snapshot.files.values()] == expected
    assert list(snapshot.files) == [path.name for path in paths]
    assert snapshot.changed() is None


def test_the_first_file_that_cannot_be_read_is_named(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    for path in paths[7], paths[30]:
        path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        hashes_of(paths)
    assert caught.value.filename == str(paths[7])
