"""Where the command line prints and exits."""

import json
import sys
import traceback
from typing import Any

from rich.console import Console
from rich.table import Table

from prox24_deploy.errors import explained

# Columns of a table that goes to a file or a pipe.
_LOG_WIDTH = 400

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def fail(error: BaseException, *, debug: bool) -> None:
    """Print one sentence (and the traceback if asked) and exit with the error's code."""
    if debug:
        stderr.print(traceback.format_exc(), markup=False)
    message, code = explained(error)
    stderr.print(f"Error: {message}", soft_wrap=True, markup=False)
    raise SystemExit(code)


def print_table(table: Table) -> None:
    """Fit a terminal; anything else, such as a log or `grep`, gets one line per row."""
    page = stdout if stdout.is_terminal else Console(width=_LOG_WIDTH, highlight=False)
    page.print(table)


def print_json(value: Any) -> None:
    """One object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
