"""What the code of other libraries runs into on what a file says is a fault of that file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prox24_deploy.core.documents import reason_of
from prox24_deploy.core.errors import Prox24Error

# Where libraries in Rust have the class of their panics from, which is no `Exception`.
_PANICS = "pyo3_runtime"


@contextmanager
def blamed(refused: Callable[[str], Prox24Error]) -> Iterator[None]:
    """Raise what `refused` makes of the reason, whatever is raised within.

    A wrong value surfaces as an error of any type, and as a panic of a library in Rust. That there
    is no memory, or that somebody interrupts, says nothing about a file.

    Raises:
        Prox24Error: one that is raised within, as it is, or what `refused` makes.
    """
    try:
        yield
    except (Prox24Error, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != _PANICS:
            raise
        raise refused(reason_of(error)) from error
