"""Whatever a library runs into on what a file says is refused in one sentence; the rest is not."""

import pytest

from prox24_deploy.core.errors import ModelDirError, UsageError
from prox24_deploy.core.foreign import blamed


class PanicException(BaseException):
    """As raised by a library in Rust."""

    __module__ = "pyo3_runtime"


def refused(reason: str) -> ModelDirError:
    return ModelDirError(f"File x cannot be used ({reason}); restore it.")


@pytest.mark.parametrize(
    "error",
    [ValueError("odd"), RecursionError("odd"), Exception("odd\nand more"), PanicException("odd.")],
)
def test_whatever_is_raised_is_a_fault_of_the_file(error: BaseException) -> None:
    told = r"^File x cannot be used \(odd\); restore it\.$"
    with pytest.raises(ModelDirError, match=told) as it, blamed(refused):
        raise error
    assert it.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), SystemExit(3), UsageError("Another.")]
)
def test_what_says_nothing_about_the_file_is_raised_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as it, blamed(refused):
        raise error
    assert it.value is error


def test_nothing_happens_where_nothing_is_raised() -> None:
    with blamed(refused):
        pass
