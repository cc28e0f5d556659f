"""What a run shows while it works: bars on a terminal, lines with the time in a log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import ProgressColumn as Column
from rich.text import Text

from prox24_deploy.cli.terminal import close_log_files, log_files, tell
from prox24_deploy.core.errors import UsageError
from prox24_deploy.core.types import STEP, silent
from prox24_deploy.core.types import Progress as Update

# Of a label whose steps are short, a line is written no more often than this.
_SECONDS = 30.0
# Labels with a line for each step: a block, a twin or an engine may take minutes.
_EVERY_STEP = frozenset({"prune", "quantize", "export", "compile"})


@contextmanager
def progress(console: Console, out: Path | None = None) -> Iterator[Update]:
    """How a command is told of progress: bars on a terminal, lines elsewhere and in a log file.

    Args:
        console: where bars are drawn.
        out: the bundle that the command writes, if any.

    Raises:
        UsageError: the log file lies in the bundle, which holds nothing but what the stages leave.
    """
    _require_outside(out)
    drawn = console.is_terminal and any(
        handler.level <= STEP for handler in logging.getLogger().handlers
    )
    lines = Lines(lambda line: tell(line, shown=console.is_terminal)).update
    if not logging.getLogger("prox24_deploy").isEnabledFor(STEP):
        yield silent
    elif not drawn:
        yield lines
    else:
        with _bars(console) as bars:

            def both(label: str, done: int, total: int) -> None:
                bars(label, done, total)
                lines(label, done, total)

            yield both


def _require_outside(out: Path | None) -> None:
    for handler in log_files() if out else ():
        path = Path(handler.baseFilename).resolve()
        if out and path.is_relative_to(out.resolve()):
            close_log_files()
            if path.stat().st_size == 0:
                # Opening it made it.
                path.unlink()
            raise UsageError(
                f"Log file {path} lies in the bundle {out}, whose every file is hashed; pass one "
                "outside of it."
            )


class Lines:
    """A line as a label begins and ends, and on the way with an estimate of the time left.

    Args:
        write: takes a line.
        clock: seconds that never go back.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._clock = write, clock
        self._began: dict[str, float] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def update(self, label: str, done: int, total: int) -> None:
        """Take note of what is done, and write a line if it is time for one."""
        if done >= total and label not in self._began:
            # Told a second time that it is over.
            return
        now = self._clock()
        began = self._began.setdefault(label, now)
        when, before = self._last.get(label, (now - _SECONDS, -1))
        due = label in _EVERY_STEP or done == total or now - when >= _SECONDS
        if not due or done == before:
            return
        self._last[label] = (now, done)
        self._write(f"{label} {done}/{total}{_time(now - began, done, total)}")
        if done >= total:
            # The same label may come again, for the next backend or twin.
            del self._began[label]
            self._last.pop(label, None)


def _time(elapsed: float, done: int, total: int) -> str:
    """The time so far, and that left."""
    if not done:
        return ""
    left = _left(elapsed, done, total)
    return f", {in_words(elapsed)}" + (f", about {left}" if left else "")


def _left(elapsed: float, done: int, total: int) -> str:
    """The time left if the rest takes as long in proportion; "" where nothing says how long."""
    return f"{in_words(elapsed / done * (total - done))} left" if 0 < done < total else ""


def in_words(seconds: float) -> str:
    """A time as one would say it: "42 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _Left(Column):
    """The time left of a bar, as lines have it."""

    def render(self, task: Task) -> Text:
        return Text(_left(task.elapsed or 0.0, int(task.completed), int(task.total or 0)))


@contextmanager
def _bars(console: Console) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _Left(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield update
