"""The commands together, and the way in and out of them."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from prox24_deploy import __version__
from prox24_deploy.cli import build, compare, inspect, package, rotate
from prox24_deploy.cli import options as arguments
from prox24_deploy.cli.help import GroupedCommand
from prox24_deploy.cli.terminal import (
    close_log_files,
    fail,
    log_file,
    log_handler,
    say,
    stderr,
    until_closed,
)
from prox24_deploy.core.errors import Prox24Error
from prox24_deploy.core.types import STEP

# What shells say of a program that a signal ended: 128 and its number.
EXIT_INTERRUPTED, EXIT_TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
_ENDINGS = {EXIT_INTERRUPTED: "Interrupted", EXIT_TERMINATED: "Terminated"}
# Characters of a line of help at most.
_WIDEST = 100

app = typer.Typer(
    # The boxes of rich cut names of options where there is little room; plain help cuts none.
    rich_markup_mode=None,
    name="prox24-deploy",
    help="Take a Hugging Face model to a 2:4-sparse, proven and measured release bundle.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDEST},
    epilog=(
        "Exit codes: 0 passed, 1 internal error, 2 bad usage or input, 3 regression, "
        "4 sparsity lost, 5 environment missing or measurement inconclusive."
    ),
)
for command in (
    build.build, rotate.rotate, build.prune, build.recover, build.export, build.compile_engines,
    build.bench, build.evaluate, build.report, inspect.plan, inspect.check, inspect.verify,
    package.package, inspect.doctor, compare.compare,
):  # fmt: skip
    # Python has a compile of its own, so that the function for it has a longer name.
    app.command(command.__name__.partition("_")[0], cls=GroupedCommand)(command)
app.add_typer(compare.baseline, name="baseline")


def main() -> None:
    """Entry point: run one command and exit with its code; every error is one sentence."""
    with until_closed():
        _run()


def _run() -> None:
    # No code of this tool may reach for a model hub, and neither may transformers.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # From 1.29 on ONNX Runtime writes to ~/.cache and reports hashes of models to its vendor.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    line = arguments.fill_budget(arguments.join_shapes(sys.argv[1:]))
    line = arguments.hoist_common(line)
    try:
        arguments.require_utf8(line)
        with _terminable():
            app(args=line, prog_name="prox24-deploy")
    except (Prox24Error, OSError) as error:
        fail(error, debug="--debug" in line)
    except SystemExit as stop:
        # typer turns an interrupt from the keyboard into this code and says nothing.
        if isinstance(stop.code, int) and stop.code in _ENDINGS:
            _say_ended(stop.code)
        raise
    except KeyboardInterrupt:
        # One that reached typer before or after the command that it watches over.
        _say_ended(EXIT_INTERRUPTED)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BaseException as error:  # the one place where a fault of ours becomes an exit code
        # Libraries in Rust panic with an error that is no Exception.
        fail(error, debug="--debug" in line)
    finally:
        close_log_files()


def _say_ended(code: int) -> None:
    text = f"{_ENDINGS[code]}; finished stages are kept, run the same command to go on."
    say(text, to=stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """End on SIGTERM as on an interrupt from the keyboard, so that what is half done is removed."""
    # Who started this process may have it ignored, and only the main thread may change it.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        # A second one does not wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(EXIT_TERMINATED)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="A line for every layer too.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Show errors and results only.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
    logged: Annotated[
        Path | None,
        typer.Option(
            "--log-file",
            metavar="FILE",
            help="Append every line to this file, those of layers too, whatever is shown.",
            readable=False,
        ),
    ] = None,
) -> None:
    """Set up logging; options here may stand anywhere on the line."""
    if version:
        say(__version__)
        raise typer.Exit
    level = logging.DEBUG if debug else logging.INFO if verbose else STEP
    if quiet:
        level = logging.ERROR
    shown = log_handler()
    shown.setLevel(level)
    handlers = [shown, *([log_file(logged)] if logged else [])]
    # Of other libraries, warnings.
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    logging.getLogger("prox24_deploy").setLevel(min(level, logging.INFO) if logged else level)
    context.obj = {"debug": debug}
