"""Where the command line prints and exits; whatever it prints goes through here."""

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from prox24_deploy.core.documents import replace_infinite
from prox24_deploy.core.errors import Prox24Error, UsageError, explained
from prox24_deploy.core.printable import MOST_CHARACTERS, printable, shortened
from prox24_deploy.core.types import STEP

# Columns of a table that goes to a file or a pipe.
_LOG_WIDTH = 400
# More than any table has.
_UNBOUND = 100_000
# Around a cell; and what a column must have room for unless it is shorter, to be read.
_PADDING, _FEWEST = 2, 20
# Ends of lines and columns, of a text that is ours or of many lines.
_LAYOUT = "\n\t"

logging.addLevelName(STEP, "STEP")
log = logging.getLogger(__name__)


class _PlainFormatter(logging.Formatter):
    """A message of ours is one line, whatever names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, as it may be shown."""
        ours = record.name.partition(".")[0] == "prox24_deploy"
        return printable(super().format(record), keep="" if ours else _LAYOUT)


class _TimedFormatter(_PlainFormatter):
    """The same behind the time, and behind a word for what is no step: one line of a log."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")
        loud = "" if record.levelno <= STEP else f"{record.levelname} "
        return f"{when} {loud}{super().format(record)}"


class _UntilClosed:
    """A stream whose reader may go before all is written; nothing is said of that."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the reader, or to nobody."""
        with self._tolerated():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send what is written."""
        with self._tolerated():
            self._stream.flush()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is left is sent when the process ends, too.
            with Path(os.devnull).open("wb") as nobody:
                os.dup2(nobody.fileno(), self._stream.fileno())


@contextmanager
def until_closed() -> Iterator[None]:
    """Print as long as there is a reader, as `head` is for some lines; the command goes on."""
    # Python has none where the process was started without.
    given = [stream and _UntilClosed(stream) for stream in (sys.stdout, sys.stderr)]
    out, err = (cast("TextIO", stream) for stream in given)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            for stream in filter(None, given):
                stream.flush()


stderr = Console(stderr=True, markup=False, emoji=False, highlight=False)
stdout = Console(markup=False, emoji=False, highlight=False)


def plain(text: str, most: int = MOST_CHARACTERS) -> Text:
    """What anything is printed as: one line of about `most` characters that acts on nothing.

    No markup, no code of a terminal, no end of a line and no sign that hides or turns text is left.
    """
    return Text(shortened(printable(text), most))


def log_handler() -> logging.Handler:
    """Writes what is logged to stderr: in colours on a terminal, elsewhere behind the time."""
    if stderr.is_terminal:
        handler: logging.Handler = RichHandler(console=stderr, show_path=False, show_time=False)
        handler.setFormatter(_PlainFormatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_TimedFormatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, "shown", False))
    return handler


def log_file(path: Path) -> logging.Handler:
    """Appends everything that is logged to a file, whatever is shown.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"Log file {path} cannot be written ({error.strerror}); pass a file in a folder that "
            "is there and may be written."
        ) from error
    handler.setFormatter(_TimedFormatter("%(message)s"))
    return handler


def log_files() -> list[logging.FileHandler]:
    """The files that are being logged to."""
    return [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]


def close_log_files() -> None:
    """Log to no file any more."""
    for handler in log_files():
        logging.getLogger().removeHandler(handler)
        handler.close()


def tell(text: str, *, level: int = STEP, shown: bool = False) -> None:
    """Log a line of the command line itself; one that is `shown` otherwise goes to files alone."""
    if not shown or log_files():
        log.log(level, "%s", printable(text), extra={"shown": shown})


def say(text: str, *, to: Console = stdout) -> None:
    """Print a sentence on one line, which no name in it can end or act on; files get it, too."""
    tell(text, shown=True)
    _print(text, to)


def _print(text: str, to: Console) -> None:
    to.print(plain(text), soft_wrap=True)


def fail(error: BaseException, *, debug: bool) -> None:
    """Print one sentence (and the traceback if asked) and exit with the error's code."""
    if debug:
        stderr.print(Text(printable(traceback.format_exc(), keep=_LAYOUT)))
    message, code = explained(error)
    tell(message, level=logging.ERROR, shown=True)
    _print(f"Error: {message}", stderr)
    if isinstance(error, Prox24Error) and error.attached:
        stderr.print(Text("\n" + printable(error.attached, keep=_LAYOUT)), soft_wrap=True)
    raise SystemExit(code)


def print_table(table: Table, *, piped: int = _LOG_WIDTH) -> None:
    """Fit a terminal; anything else, such as a log or `grep`, gets one line per row.

    Where there is too little room, on a terminal for the longest words side by side, each row is a
    block of lines, for a name that is cut is no name. Files of the log get what a pipe does.

    Args:
        table: of cells that are texts.
        piped: characters of a line at most where there is no terminal.
    """
    for line in _lines(table, _LOG_WIDTH) if log_files() else ():
        tell(line, shown=True)
    if not stdout.is_terminal:
        for line in _lines(table, piped):
            stdout.print(Text(line), soft_wrap=True)
    elif _fits(table, stdout):
        stdout.print(table)
    else:
        for block in _stacked(table):
            stdout.print(block, soft_wrap=True)


def _lines(table: Table, width: int) -> list[str]:
    """The table as plain text, each row as long as what it says."""
    page = Console(width=width, highlight=False, color_system=None)
    if not _fits(table, page, folded=False):
        return [str(line) for line in _stacked(table)]
    with page.capture() as captured:
        page.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _fits(table: Table, page: Console, *, folded: bool = True) -> bool:
    """Whether every column has room for its words, and for some of them in one line.

    Where rows may be folded and are, gives each column its width: a table left to itself would cut
    words.
    """
    columns = [_measured(table, i, page) for i in range(len(table.columns))]
    least = [max(column.minimum, min(column.maximum, _FEWEST)) for column in columns]
    wanted = [column.maximum - few for column, few in zip(columns, least, strict=True)]
    spare = page.width - sum(least) - _PADDING * len(columns)
    if spare < (0 if folded else sum(wanted)):
        return False
    if sum(wanted) > spare:
        for column, few, more in zip(table.columns, least, wanted, strict=True):
            column.width = few + more * spare // sum(wanted)
    return True


def _measured(table: Table, index: int, page: Console) -> Measurement:
    """The longest word and the longest line of a column."""
    column = table.columns[index]
    unbound = page.options.update(max_width=_UNBOUND)
    cells = [Measurement.get(page, unbound, cell) for cell in (column.header, *column.cells)]
    return Measurement(max(cell.minimum for cell in cells), max(cell.maximum for cell in cells))


def _stacked(table: Table) -> Iterator[Text]:
    """Rows one below the other: the first cell, then each other one that says something."""
    headers = [str(column.header) for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    for row, (first, *others) in zip(table.rows, cells, strict=True):
        yield Text(str(first), style=row.style or "")
        for header, cell in zip(headers[1:], others, strict=True):
            if str(cell):
                yield Text(f"  {header}: {cell}", style=row.style or "")


def print_text(text: str) -> None:
    """Lines of ours for a file, as they are."""
    sys.stdout.write(text)


def print_json(value: Any) -> None:
    """One object on stdout, in ASCII, so that it can be shown and sent anywhere.

    A number that is not finite is null, for JSON has none.
    """
    shown = replace_infinite(value, lambda _: None)
    sys.stdout.write(json.dumps(shown, default=str, allow_nan=False) + "\n")
