"""Run the command line in this process, as the installed script would."""

import contextlib
import hashlib
import io
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from prox24_deploy import cli

# What a tiny random model may lose and still pass: its neighbours, classes and words are near ties,
# so that no default limit is meant for it. Where a test is about accuracy, it says its own.
ANY_EMBEDDING = (
    "--accept-loss", "embedding cosine=0", "--accept-loss", "nearest-neighbour agreement=0",
)  # fmt: skip
ANY_TEXT = ("--accept-loss", "perplexity=1000%")
ANY_CLASS = ("--accept-loss", "top-1 agreement=0")
ANY_LABEL = ("--accept-loss", "accuracy=1")


@dataclass(frozen=True, slots=True)
class Run:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run_cli(*arguments: str | Path) -> Run:
    """One command with its arguments; never raises SystemExit."""
    out, err = io.StringIO(), io.StringIO()
    logger, root = logging.getLogger("prox24_deploy"), logging.getLogger()
    level, root_level, handlers = logger.level, root.level, list(root.handlers)
    argv = ["prox24-deploy", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            # The command sets them; what other tests hear must not hang on their order.
            logger.setLevel(level)
            root.setLevel(root_level)
            root.handlers[:] = handlers
    return Run(code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its content, "folder" for a folder."""
    return {
        path.relative_to(folder).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }
