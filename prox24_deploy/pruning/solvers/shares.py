"""What the processes that solve some rows each of the same layers tell each other."""

from typing import Protocol

from torch import Tensor


class Shares(Protocol):
    """The part of one process; whatever one calls, all must call.

    What concerns all rows is decided by sums over all processes, so that all decide the same.
    """

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        ...

    def rows(self, count: int) -> slice:
        """Which of so many rows are this process's."""
        ...

    def gathered(self, part: Tensor, count: int) -> Tensor:
        """All of so many rows, of which each process has its own."""
        ...


class _Whole:
    """All of it, where one process has all rows."""

    def total(self, value: float) -> float:
        return value

    def rows(self, count: int) -> slice:
        return slice(0, count)

    def gathered(self, part: Tensor, count: int) -> Tensor:
        assert len(part) == count, "one process has all rows"
        return part


WHOLE = _Whole()
