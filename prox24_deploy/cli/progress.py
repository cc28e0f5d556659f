"""What a run shows while it works: bars on a terminal, lines with the time in a log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prox24_deploy.cli.terminal import say
from prox24_deploy.core.types import Progress as Update
from prox24_deploy.core.types import silent

# Of a label whose steps are short, a line is written no more often than this.
_SECONDS = 30.0
# Labels with a line for each step: a block may take minutes.
_EVERY_STEP = frozenset({"prune"})


@contextmanager
def progress(console: Console) -> Iterator[Update]:
    """How a command is told of progress; nothing is shown where warnings are not."""
    if not logging.getLogger("prox24_deploy").isEnabledFor(logging.WARNING):
        yield silent
    elif console.is_terminal:
        with _bars(console) as update:
            yield update
    else:
        yield Lines(lambda line: say(line, to=console)).update


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
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        self._write(f"{stamp} {label} {done}/{total}{_time(now - began, done, total)}")
        if done >= total:
            # The same label may come again, for the next backend or twin.
            del self._began[label]
            self._last.pop(label, None)


def _time(elapsed: float, done: int, total: int) -> str:
    """Seconds so far, and those left if the rest takes as long in proportion."""
    if not done:
        return ""
    left = elapsed / done * (total - done)
    return f", {in_words(elapsed)}" + (f", about {in_words(left)} left" if done < total else "")


def in_words(seconds: float) -> str:
    """A time as one would say it: "42 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def _bars(console: Console) -> Iterator[Update]:
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield update
