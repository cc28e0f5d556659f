"""The command line: the only place that prints or exits."""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from prox24_deploy import __version__, arguments, tables
from prox24_deploy.errors import BundleError, Prox24Error
from prox24_deploy.options import BuildOptions, TextOptions

if TYPE_CHECKING:
    from prox24_deploy.release.report import Report

EXIT_INTERNAL, EXIT_USAGE, EXIT_REGRESSION, EXIT_SPARSITY, EXIT_INCONCLUSIVE = 1, 2, 3, 4, 5
EXIT_INTERRUPTED = 130
_LOG_WIDTH = 400
_TEXT = TextOptions()
_VERDICT_EXIT = {"pass": 0, "fail": EXIT_REGRESSION, "inconclusive": EXIT_INCONCLUSIVE}

app = typer.Typer(
    name="prox24-deploy",
    help="Take a Hugging Face model to a 2:4-sparse, proven and measured release bundle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 passed, 1 internal error, 2 bad usage or input, 3 regression, "
        "4 sparsity lost, 5 environment missing or measurement inconclusive."
    ),
)
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def main() -> None:
    """Entry point: run one command and exit with its code; every error is one sentence."""
    # No code of this tool may reach for a model hub, and neither may transformers.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # From 1.29 on ONNX Runtime writes to ~/.cache and reports hashes of models to its vendor.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    line = arguments.hoist_common(arguments.join_shapes(sys.argv[1:]))
    try:
        app(args=line, prog_name="prox24-deploy")
    except (Prox24Error, OSError) as error:
        _fail(error, debug="--debug" in line)
    except SystemExit as stop:
        # typer turns an interrupt from the keyboard into this code and says nothing.
        if stop.code == EXIT_INTERRUPTED:
            stderr.print("Interrupted; finished stages are kept, run the same command to go on.")
        raise
    except Exception as error:  # the one place where a fault of ours becomes an exit code
        _fail(error, debug="--debug" in line)


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log every layer.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Set up logging; options here come before the command."""
    if version:
        stdout.print(__version__)
        raise typer.Exit
    level = logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=stderr, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("prox24_deploy").setLevel(level)
    context.obj = {"debug": debug}


@app.command()
def build(
    model_dir: arguments.ModelArg,
    out: arguments.OutOpt = None,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.CalibrationOpt = None,
    evaluation: arguments.EvaluationOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    evaluation_tokens: arguments.EvaluationTokensOpt = _TEXT.evaluation_tokens,
    images: arguments.ImagesOpt = _TEXT.images,
    method: arguments.MethodOpt = "prox",
    preset: arguments.PresetOpt = "default",
    refinement: arguments.RefinementOpt = "auto",
    reconstruct: arguments.ReconstructOpt = None,
    include: arguments.IncludeOpt = None,
    exclude: arguments.ExcludeOpt = None,
    max_loss: arguments.MaxLossOpt = None,
    layers: arguments.LayersOpt = None,
    dtype: arguments.DTypeOpt = "float32",
    backend: arguments.BackendOpt = None,
    shapes: arguments.ShapesOpt = None,
    device: arguments.DeviceOpt = "auto",
    seed: arguments.SeedOpt = 0,
    fresh: arguments.FreshOpt = False,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Prune, export, prove, compile, measure and report: everything, into one bundle."""
    from prox24_deploy import pipeline

    options = BuildOptions(
        recipe,
        arguments.text_options(
            calibration, evaluation, calibration_tokens, evaluation_tokens, images, seed
        ),
        arguments.prune_options(
            method, preset, refinement, reconstruct, include, exclude, max_loss, layers
        ),
        device,
        dtype,
        arguments.engine_options(backend, shapes),
    )
    root = out or _default_out(model_dir)
    with _progress() as progress:
        report = pipeline.build(model_dir, root, options, fresh=fresh, progress=progress)
    if as_json:
        _print_json(report.model_dump(mode="json"))
    else:
        _print_report(report, root)
    raise typer.Exit(_exit_code(report))


@app.command()
def prune(
    model_dir: arguments.ModelArg,
    out: arguments.OutOpt = None,
    recipe: arguments.RecipeOpt = None,
    calibration: arguments.CalibrationOpt = None,
    evaluation: arguments.EvaluationOpt = None,
    calibration_tokens: arguments.TokensOpt = _TEXT.calibration_tokens,
    evaluation_tokens: arguments.EvaluationTokensOpt = _TEXT.evaluation_tokens,
    images: arguments.ImagesOpt = _TEXT.images,
    method: arguments.MethodOpt = "prox",
    preset: arguments.PresetOpt = "default",
    refinement: arguments.RefinementOpt = "auto",
    reconstruct: arguments.ReconstructOpt = None,
    include: arguments.IncludeOpt = None,
    exclude: arguments.ExcludeOpt = None,
    max_loss: arguments.MaxLossOpt = None,
    layers: arguments.LayersOpt = None,
    device: arguments.DeviceOpt = "auto",
    seed: arguments.SeedOpt = 0,
    fresh: arguments.FreshOpt = False,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Prune only: OUT becomes a bundle with the pruned model directory."""
    from prox24_deploy import pipeline

    options = BuildOptions(
        recipe,
        arguments.text_options(
            calibration, evaluation, calibration_tokens, evaluation_tokens, images, seed
        ),
        arguments.prune_options(
            method, preset, refinement, reconstruct, include, exclude, max_loss, layers
        ),
        device,
    )
    root = out or _default_out(model_dir)
    with _progress() as progress:
        result = pipeline.prune(model_dir, root, options, fresh=fresh, progress=progress)
    if as_json:
        _print_json(asdict(result))
        return
    pruned = [layer for layer in result.layers if layer.status == "pruned"]
    _print_table(tables.layers(result.layers))
    stdout.print(f"{len(pruned)} layers are 2:4 in {root / 'pruned'}.", soft_wrap=True)


@app.command()
def export(
    bundle: arguments.BundleArg,
    dtype: arguments.DTypeOpt = "float32",
    as_json: arguments.JsonOpt = False,
) -> None:
    """Export dense and sparse ONNX twins of a pruned bundle and prove 2:4 on the file."""
    from prox24_deploy import pipeline

    with _progress() as progress:
        result = pipeline.export(bundle, dtype, progress=progress)
    if as_json:
        _print_json(asdict(result))
        return
    proven = sum(check.expected and check.is_24 for check in result.sparsity)
    worst = max((c.max_abs_difference for c in result.numerics), default=float("nan"))
    files = " and ".join(str(bundle / model.path) for model in result.sparse)
    stdout.print(
        f"{proven} weights proven 2:4 in {files}; largest difference to PyTorch {worst:.2g}.",
        soft_wrap=True,
    )


@app.command("compile")
def compile_engines(
    bundle: arguments.BundleArg,
    backend: arguments.BackendOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Compile engines from the ONNX twins of a bundle."""
    from prox24_deploy import pipeline

    with _progress() as progress:
        result = pipeline.compile_engines(
            bundle, arguments.engine_options(backend, None), progress=progress
        )
    if as_json:
        _print_json(asdict(result))
        return
    for engine in result.engines:
        stdout.print(f"{engine.twin}: {bundle / engine.path}", soft_wrap=True)
    for evidence in result.evidence:
        stdout.print(f"{evidence.backend}: {evidence.summary}", soft_wrap=True)


@app.command()
def bench(
    bundle: arguments.BundleArg,
    shapes: arguments.ShapesOpt = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Measure dense against sparse latency of a bundle's engines, interleaved."""
    from prox24_deploy import pipeline

    with _progress() as progress:
        result = pipeline.bench(bundle, arguments.engine_options(None, shapes), progress=progress)
    if as_json:
        _print_json(asdict(result))
        return
    _print_table(tables.latency(result.latency))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Model directory, safetensors or ONNX file.")],
    ignore: Annotated[
        list[str] | None, typer.Option(help="Weights that may be dense, as globs; repeatable.")
    ] = None,
    as_json: arguments.JsonOpt = False,
) -> None:
    """Check the 2:4 pattern of every weight along its reduction axis; exit 4 if it is violated.

    A file that declares its 2:4 weights is held to that; in any other file every weight that no
    --ignore matches must be 2:4.
    """
    from prox24_deploy.graph.check import check_path, require_24

    report = check_path(path, ignore or ())
    if as_json:
        _print_json(asdict(report))
    else:
        _print_table(tables.checks(report.tensors))
    require_24(report)


@app.command()
def verify(bundle: arguments.BundleArg, as_json: arguments.JsonOpt = False) -> None:
    """Re-hash every file of a bundle against its manifest."""
    from prox24_deploy.release.manifest import read_manifest
    from prox24_deploy.release.manifest import verify as faults_of

    faults = faults_of(bundle)
    if as_json:
        _print_json({"bundle": str(bundle), "sound": not faults, "faults": faults})
    if faults:
        for fault in faults[1:]:
            stderr.print(fault, soft_wrap=True, markup=False)
        raise BundleError(f"Bundle {bundle} does not verify: {faults[0]}")
    if not as_json:
        count = len(read_manifest(bundle).files)
        stdout.print(f"{bundle}: {count} files match their hashes.", soft_wrap=True)


@app.command()
def doctor(as_json: arguments.JsonOpt = False) -> None:
    """Say what this machine can do, and how to get what is missing."""
    from prox24_deploy.release.environment import diagnose

    findings = diagnose()
    if as_json:
        _print_json({"findings": [asdict(finding) for finding in findings]})
        return
    _print_table(tables.findings(findings))


def _default_out(model_dir: Path) -> Path:
    return Path(f"{model_dir.resolve().name}-prox24")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage on a terminal; nothing anywhere else."""
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield update


def _fail(error: BaseException, *, debug: bool) -> None:
    """Print one sentence (and the traceback if asked) and exit with the error's code."""
    if debug:
        stderr.print(traceback.format_exc(), markup=False)
    if isinstance(error, Prox24Error):
        message, code = str(error), error.exit_code
    elif isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        where = f" while writing {error.filename}" if error.filename else ""
        message = (
            f"No space left on the disk{where}; free some and run the same command again, "
            "finished stages are kept."
        )
        code = EXIT_USAGE
    elif isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EROFS, errno.EPERM}:
        message = (
            f"{error.filename or 'A file'} cannot be written ({error.strerror}); pass another -o."
        )
        code = EXIT_USAGE
    else:
        kind = type(error).__name__
        message = f"Internal error, {kind}: {error}; run again with --debug and report it."
        code = EXIT_INTERNAL
    stderr.print(f"Error: {message}", soft_wrap=True, markup=False)
    raise SystemExit(code)


def _exit_code(report: "Report") -> int:
    if any(check.expected and not check.is_24 for check in report.sparsity.tensors):
        return EXIT_SPARSITY
    return _VERDICT_EXIT[report.verdict]


def _print_table(table: Table) -> None:
    """Fit a terminal; anything else, such as a log or `grep`, gets one line per row."""
    page = stdout if stdout.is_terminal else Console(width=_LOG_WIDTH, highlight=False)
    page.print(table)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def _print_report(report: "Report", root: Path) -> None:
    """The page of a build: verdict, accuracy, latency, warnings, where to look."""
    totals = report.pruning.totals
    stdout.print(f"Verdict: {report.verdict}")
    stdout.print(f"Pruned: {totals.pruned} layers proven 2:4, {totals.skipped} left dense")
    for metric in report.accuracy.metrics:
        stdout.print(tables.metric_line(metric), soft_wrap=True)
    _print_table(tables.latency(report.latency))
    for warning in report.warnings:
        stdout.print(f"Note: {warning}", soft_wrap=True, markup=False)
    stdout.print(f"Report: {root / 'report.html'}", soft_wrap=True, markup=False)
