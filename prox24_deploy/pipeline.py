"""From a model directory to a sealed bundle: the stages, in order, and each on its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prox24_deploy import engine_accuracy, engine_stages, stages, task_accuracy
from prox24_deploy.artifacts import (
    BenchResult,
    CompileResult,
    DType,
    ExportResult,
    PruneResult,
)
from prox24_deploy.demands import check_demands, read_demands
from prox24_deploy.errors import BackendMissingError
from prox24_deploy.options import BuildOptions, EngineOptions
from prox24_deploy.release.bundle import open_bundle
from prox24_deploy.release.report import Report
from prox24_deploy.subject import read_subject

Progress = Callable[[str, int, int], None]


def build(
    model_dir: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Progress
) -> Report:
    """Take a model directory to a sealed bundle in `out` and return its report.

    Stages whose inputs are unchanged since an earlier run in `out` are not run again.

    Raises:
        Prox24Error: any of its kinds; the stages finished until then are kept.
    """
    # Read before any work, so that a wrong path costs no time.
    demands = read_demands(options)
    subject = read_subject(model_dir, out, options, progress)
    task_accuracy.require_usable(options.harness, subject.recipe)
    backends = engine_stages.open_backends(
        options.engine, model_dir, subject.recipe, subject.directory.config
    )
    check_demands(demands, subject, [backend.name for backend in backends], options)
    with open_bundle(out, fresh=fresh) as bundle:
        stages.describe(bundle, subject, options)
        task_accuracy.verify(bundle, options.harness)
        pruned = stages.prune(bundle, subject, options.prune, options.device, progress)
        exported = stages.export(bundle, options.dtype, progress)
        compiled = engine_stages.compile_engines(bundle, exported, backends, progress)
        measured = engine_stages.bench(bundle, compiled, backends, options.engine, progress)
        evaluated = stages.evaluate(bundle, subject, options.device, progress)
        through = engine_accuracy.measure(bundle, subject, compiled, backends, options, progress)
        tasks = task_accuracy.measure(bundle, subject, options, progress)
        return stages.report(
            bundle, pruned, exported, compiled, measured, evaluated, demands.gate, through, tasks,
            demands.given,
        )  # fmt: skip


def prune(
    model_dir: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Progress
) -> PruneResult:
    """Run only the pruning stage: `out` becomes a bundle with `pruned/`."""
    subject = read_subject(model_dir, out, options, progress)
    with open_bundle(out, fresh=fresh) as bundle:
        stages.describe(bundle, subject, options)
        return stages.prune(bundle, subject, options.prune, options.device, progress)


def export(out: Path, dtype: DType, *, progress: Progress) -> ExportResult:
    """Run only the export stage, on a bundle that holds a pruned model."""
    with open_bundle(out, existing=True) as bundle:
        bundle.load("prune", PruneResult)
        return stages.export(bundle, dtype, progress)


def compile_engines(out: Path, options: EngineOptions, *, progress: Progress) -> CompileResult:
    """Run only the compile stage, on a bundle that holds exported models."""
    with open_bundle(out, existing=True) as bundle:
        exported = bundle.load("export", ExportResult)
        backends = engine_stages.backends_of(bundle, options)
        return engine_stages.compile_engines(bundle, exported, backends, progress)


def bench(out: Path, options: EngineOptions, *, progress: Progress) -> BenchResult:
    """Run only the bench stage, on a bundle that holds engines; always measures anew.

    Raises:
        BackendMissingError: no engine of the bundle can run on this machine.
    """
    with open_bundle(out, existing=True) as bundle:
        compiled = bundle.load("compile", CompileResult)
        names = tuple(dict.fromkeys(engine.backend for engine in compiled.engines))
        backends = engine_stages.backends_of(bundle, replace(options, backends=names))
        bundle.forget("bench", [])
        result = engine_stages.bench(bundle, compiled, backends, options, progress)
    if not result.latency and result.not_measured:
        raise BackendMissingError(result.not_measured[0].reason)
    return result
