"""From a model directory to a sealed bundle: the stages, in order, and each on its own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle, open_bundle
from prox24_deploy.config.options import BuildOptions, EngineOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import BackendMissingError
from prox24_deploy.core.records import BenchResult, CompileResult, ExportResult, PruneResult
from prox24_deploy.core.types import DType, Progress
from prox24_deploy.engines.base import Backend
from prox24_deploy.pipeline.context import config_of, model_of, read_subject, recipe_of, source_of
from prox24_deploy.pipeline.demands import check_demands, read_demands, warn_of_few_samples
from prox24_deploy.pipeline.stages import engine_accuracy
from prox24_deploy.pipeline.stages import engines as engine_stages
from prox24_deploy.pipeline.stages import evaluate as evaluate_stage
from prox24_deploy.pipeline.stages import export as export_stage
from prox24_deploy.pipeline.stages import harness as task_accuracy
from prox24_deploy.pipeline.stages import prune as prune_stage
from prox24_deploy.pipeline.stages import report as report_stage
from prox24_deploy.report.assemble import Report

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir


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
    source, recipe, engine = subject.directory, subject.recipe, options.engine
    dtype = _settled_dtype(source, recipe, options.dtype)
    options = replace(options, dtype=dtype)
    task_accuracy.require_usable(options.harness, recipe)
    backends = engine_stages.open_backends(
        engine, source.path, source.sha256, recipe, source.config
    )
    check_demands(demands, subject, [backend.name for backend in backends], options)
    with open_bundle(out, fresh=fresh) as bundle:
        warn_of_few_samples(subject)
        task_accuracy.verify(bundle, options.harness)
        pruned = prune_stage.prune(bundle, subject, options, progress)
        exported = export_stage.export(bundle, source, recipe, pruned, dtype, progress)
        compiled = engine_stages.compile_engines(bundle, exported, recipe, backends, progress)
        measured = engine_stages.bench(
            bundle, compiled, backends, engine, recipe, source.config, progress
        )
        evaluated = evaluate_stage.evaluate(bundle, subject, options.device, progress)
        through = engine_accuracy.measure(bundle, subject, compiled, backends, options, progress)
        tasks = task_accuracy.measure(bundle, subject, options, progress)
        return report_stage.report(
            bundle, subject, pruned, exported, compiled, measured, evaluated, demands.gate, through,
            tasks, demands.given,
        )  # fmt: skip


def prune(
    model_dir: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Progress
) -> PruneResult:
    """Run only the pruning stage: `out` becomes a bundle with `pruned/`."""
    subject = read_subject(model_dir, out, options, progress)
    with open_bundle(out, fresh=fresh) as bundle:
        return prune_stage.prune(bundle, subject, options, progress)


def export(out: Path, dtype: DType | None, *, progress: Progress) -> ExportResult:
    """Run only the export stage, on a bundle that holds a pruned model.

    A `dtype` of None means that of the checkpoint.
    """
    with open_bundle(out, existing=True) as bundle:
        pruned = bundle.load(prune_stage.PRUNE)
        source, recipe = source_of(bundle), recipe_of(bundle)
        settled = _settled_dtype(source, recipe, dtype)
        return export_stage.export(bundle, source, recipe, pruned, settled, progress)


def compile_engines(out: Path, options: EngineOptions, *, progress: Progress) -> CompileResult:
    """Run only the compile stage, on a bundle that holds exported models."""
    with open_bundle(out, existing=True) as bundle:
        exported = bundle.load(export_stage.EXPORT)
        recipe = recipe_of(bundle)
        backends = _backends_of(bundle, recipe, options)
        return engine_stages.compile_engines(bundle, exported, recipe, backends, progress)


def bench(out: Path, options: EngineOptions, *, progress: Progress) -> BenchResult:
    """Run only the bench stage, on a bundle that holds engines; always measures anew.

    Raises:
        BackendMissingError: no engine of the bundle can run on this machine.
    """
    with open_bundle(out, existing=True) as bundle:
        compiled = bundle.load(engine_stages.COMPILE)
        recipe = recipe_of(bundle)
        names = tuple(dict.fromkeys(engine.backend for engine in compiled.engines))
        backends = _backends_of(bundle, recipe, replace(options, backends=names))
        config = config_of(bundle)
        result = engine_stages.bench(
            bundle, compiled, backends, options, recipe, config, progress, anew=True
        )
    if not result.latency and result.not_measured:
        raise BackendMissingError(result.not_measured[0].reason)
    return result


def _settled_dtype(source: "ModelDir", recipe: Recipe, asked: DType | None) -> DType:
    # Imports torch, which stages that are not run anew do without.
    from prox24_deploy.model.dtypes import settled_dtype

    return settled_dtype(source, recipe, asked)


def _backends_of(bundle: Bundle, recipe: Recipe, options: EngineOptions) -> tuple[Backend, ...]:
    """The backends asked for, for the model of a bundle."""
    model = model_of(bundle)
    return engine_stages.open_backends(
        options, Path(model.path), model.sha256, recipe, config_of(bundle)
    )
