"""Exit codes are a public contract: release pipelines branch on them."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prox24_deploy.core import errors
from prox24_deploy.core.atomic import writing
from prox24_deploy.core.errors import Prox24Error, explained

EXIT_CODES = {
    "Prox24Error": 1,
    "UsageError": 2,
    "ModelDirError": 2,
    "RecipeError": 2,
    "CalibrationError": 2,
    "BundleError": 2,
    "SparsityLostError": 4,
    "SparsityUnprovenError": 5,
    "RankError": 1,
    "RankGoneError": 1,
    "ExportError": 1,
    "EngineError": 1,
    "BackendMissingError": 5,
}
ERRORS: dict[str, type[Prox24Error]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type)
}


def test_every_error_keeps_its_exit_code() -> None:
    assert all(issubclass(error, Prox24Error) for error in ERRORS.values())
    assert {name: error.exit_code for name, error in ERRORS.items()} == EXIT_CODES


def test_the_drawn_tree_is_the_tree() -> None:
    """Parent and exit code of every line of the docstring."""
    lines = re.findall(r"^([ │├└─]*)(\w+Error) +(?:exit code )?(\d)", errors.__doc__ or "", re.M)
    branch = ["Exception"]
    drawn = {}
    for indent, name, code in lines:
        depth = len(indent) // 4
        branch = [*branch[: depth + 1], name]
        drawn[name] = (branch[depth], int(code))
    assert drawn == {
        name: (error.__bases__[0].__name__, error.exit_code) for name, error in ERRORS.items()
    }


FILE_ERRORS = [
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG, errno.ENODEV, errno.ENXIO,
    errno.EMFILE, errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ESTALE,
    errno.ENOENT, errno.EBUSY, errno.ETIMEDOUT, errno.EREMOTEIO,
]  # fmt: skip


def of_the_system(number: int, name: str | None = "/some/file") -> OSError:
    return OSError(number, os.strerror(number), name)


@pytest.mark.parametrize("number", FILE_ERRORS, ids=errno.errorcode.__getitem__)
def test_what_the_system_refuses_is_said_truly(number: int, tmp_path: Path) -> None:
    message, code = explained(of_the_system(number))
    assert code == 2
    assert message.startswith(f"/some/file cannot be read ({os.strerror(number)}); ")
    assert message.endswith(".")
    refused = pytest.raises(OSError, match=re.escape(os.strerror(number)))
    with refused as caught, writing(tmp_path / "target"):
        raise of_the_system(number, None)
    message, code = explained(caught.value)
    assert code == 2
    assert message.startswith(f"{tmp_path / 'target'} cannot be written ({os.strerror(number)}); ")


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EROFS, errno.ETXTBSY])
def test_some_things_go_wrong_only_where_one_writes(number: int) -> None:
    message, code = explained(of_the_system(number))
    assert (message.startswith("/some/file cannot be written ("), code) == (True, 2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(number: int) -> None:
    message, code = explained(of_the_system(number))
    assert message.startswith("No space left on the disk while writing /some/file; free some")
    assert code == 2


def test_what_the_system_says_of_a_fault_of_ours_is_one() -> None:
    for error in (of_the_system(errno.EBADF), of_the_system(errno.EINVAL), OSError("no number")):
        message, code = explained(error)
        assert message.startswith("Internal error, OSError: ")
        assert code == 1


def test_a_file_limit_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The limit is set in a process of its own, for it cannot be taken back."""
    script = f"""
import resource, sys
from pathlib import Path
from prox24_deploy.core.errors import explained
from prox24_deploy.core.atomic import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path({str(tmp_path / "file")!r}), bytes(5000))
except OSError as error:
    print(*explained(error), sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    message, code = ran.stdout.strip().split("|")
    assert message.startswith(f"{tmp_path / 'file'} cannot be written (File too large); raise the")
    assert code == "2"
    assert list(tmp_path.iterdir()) == []
