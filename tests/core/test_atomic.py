from pathlib import Path

import pytest

from prox24_deploy.core.atomic import copy_file, make_folder, write_atomic
from prox24_deploy.core.errors import explained


def test_atomic_write_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_failed_atomic_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("broken", ["source", "target"])
def test_a_copy_tells_which_side_failed(tmp_path: Path, broken: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 5000)
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    path = tmp_path / broken
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        copy_file(source, target)
    message, code = explained(caught.value)
    assert message.startswith(f"{path} cannot be {'read' if broken == 'source' else 'written'} (Is")
    assert code == 2


def test_a_folder_that_cannot_be_made_is_told_as_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as caught:
        make_folder(tmp_path / "file" / "folder")
    assert " cannot be written (Not a directory); " in explained(caught.value)[0]
