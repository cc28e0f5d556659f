"""Every exception that prox24-deploy raises on purpose.

Prox24Error                  exit code 1
├── UsageError               2   an option or argument that cannot be used
├── ModelDirError            2   the model directory is missing, damaged or not supported
├── RecipeError              2   the export recipe cannot be read or does not fit the model
├── CalibrationError         2   calibration or evaluation text is missing, empty or too short
├── BundleError              2   the output directory cannot be used, or does not verify
├── SparsityLostError        4   a weight that must be 2:4 is not
├── SparsityUnprovenError    5   a weight that must be 2:4 cannot be shown to be, or none was read
├── RankError                1   a process of a run on several is gone, or differs from the others
│   └── RankGoneError        1   one is gone, and this one cannot say when
├── ExportError              1   the model could not be exported, or its file differs in numerics
└── EngineError              1   a backend failed to build or run
    └── BackendMissingError  5   a library or device that the backend needs is not there

Each message is one sentence that names the thing, its value, what was expected and the remedy.
A regression is a result in the report, not an exception.
"""

import errno
import os

# Noted on an OSError by what writes; any other was met while something was read.
WRITING = "while this was written"


class Prox24Error(Exception):
    """Base of all errors; `exit_code` is what the command line exits with.

    `attached` is what a sentence ends by pointing at, such as a file to save.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, attached: str = "") -> None:
        super().__init__(message)
        self.attached = attached


class UsageError(Prox24Error):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class ModelDirError(Prox24Error):
    """The model directory is missing, damaged, unsafe or of an unsupported kind."""

    exit_code = 2


class RecipeError(Prox24Error):
    """The recipe cannot be read, has unknown keys, or does not fit the model."""

    exit_code = 2


class CalibrationError(Prox24Error):
    """Calibration or evaluation text is missing, empty, too short or not decodable."""

    exit_code = 2


class BundleError(Prox24Error):
    """The output directory cannot be used, is full, or does not match its manifest."""

    exit_code = 2


class SparsityLostError(Prox24Error):
    """A weight that must be 2:4 along its reduction axis is not."""

    exit_code = 4


class SparsityUnprovenError(Prox24Error):
    """It is neither shown nor refuted that what must be 2:4 is."""

    exit_code = 5


class RankError(Prox24Error):
    """One of several processes that share a run is gone, or is not like the others."""


class RankGoneError(RankError):
    """Another process is gone; what started them may know which, and how far they came."""


class ExportError(Prox24Error):
    """The model could not be exported, or the exported file computes something else."""


class EngineError(Prox24Error):
    """A backend failed to build or to run an engine."""


class BackendMissingError(EngineError):
    """A library or device that the backend needs is missing; the message names the remedy."""

    exit_code = 5


def explained(error: BaseException) -> tuple[str, int]:
    """One sentence for the user and the exit code, for an error of any kind."""
    if isinstance(error, Prox24Error):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return _of_the_system(error, error.errno), UsageError.exit_code
    if isinstance(error, MemoryError):
        return (
            "Not enough memory for this model and these options; close other programs, ask for "
            "less, or run on a machine that has more."
        ), BackendMissingError.exit_code
    kind = type(error).__name__
    message = f"Internal error, {kind}: {error}; run again with --debug and report it."
    return message, Prox24Error.exit_code


def _of_the_system(error: OSError, number: int) -> str:
    """One sentence on what the system refused: a file, to read or to write it, and why."""
    named = error.filename is not None
    if number in {errno.ENOSPC, errno.EDQUOT}:
        where = f" while writing {error.filename}" if named else ""
        return (
            f"No space left on the disk{where}; free some and run the same command again, "
            "finished stages are kept."
        )
    writing = number in _OF_WRITING or WRITING in getattr(error, "__notes__", ())
    done = "written" if writing else "read"
    remedy = _REMEDIES[number]
    if not remedy:
        remedy = "pass another -o, or change its rights" if writing else "make it readable"
    what = error.filename if named else "A file"
    return f"{what} cannot be {done} ({error.strerror or os.strerror(number)}); {remedy}."


_CORRECT, _AGAIN = "correct the path", "check its disk or network, and run the same command again"
# What the system says of files, paths and limits, with what to do; "" depends on the direction.
# Anything else that it says is a fault of ours.
_REMEDIES = {
    errno.ENOSPC: "",
    errno.EDQUOT: "",
    errno.EACCES: "",
    errno.EPERM: "",
    errno.EROFS: "",
    errno.EFBIG: "raise the limit on sizes of files (ulimit -f), or use another file system",
    errno.EMFILE: "raise the limit on open files with ulimit -n",
    errno.ENFILE: "close other programs, for this machine allows no more open files",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOENT: _CORRECT,
    errno.ENOTDIR: _CORRECT,
    errno.EISDIR: _CORRECT,
    errno.ELOOP: _CORRECT,
    errno.EEXIST: _CORRECT,
    errno.ENOTEMPTY: _CORRECT,
    errno.EXDEV: _CORRECT,
    errno.EBUSY: _AGAIN,
    errno.ETXTBSY: _AGAIN,
    errno.EIO: _AGAIN,
    errno.ENODEV: _AGAIN,
    errno.ENXIO: _AGAIN,
    errno.ESTALE: _AGAIN,
    errno.ETIMEDOUT: _AGAIN,
    errno.EHOSTDOWN: _AGAIN,
    errno.EHOSTUNREACH: _AGAIN,
    errno.ENOTCONN: _AGAIN,
    errno.EREMOTEIO: _AGAIN,
}
_OF_WRITING = {errno.EROFS, errno.EFBIG, errno.ETXTBSY, errno.ENOTEMPTY, errno.EEXIST}
