"""From a model directory to a sealed bundle: the stages, in order, and each on its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import open_bundle
from prox24_deploy.bundle.layout import MANIFEST_FILE, PRUNED, RECOVERED, shipped_folder
from prox24_deploy.bundle.manifest import read_manifest
from prox24_deploy.config.options import BenchOptions, BuildOptions, EngineOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.errors import (
    BackendMissingError,
    CalibrationError,
    ModelDirError,
    UsageError,
)
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    EvaluateResult,
    ExportResult,
    PruneResult,
)
from prox24_deploy.core.recovery import RecoverResult
from prox24_deploy.core.results import BuildResults
from prox24_deploy.core.types import DType, Progress, Quantize
from prox24_deploy.engines.base import Backend
from prox24_deploy.pipeline import finish, stages
from prox24_deploy.pipeline.backends import backends_of, open_backends
from prox24_deploy.pipeline.context import (
    RunContext,
    open_model,
    read_context,
    source_of,
    torch_device,
    warn_of_lengths,
)
from prox24_deploy.pipeline.demands import (
    check_demands,
    read_demands,
    warn_beforehand,
    warn_of_idle,
)
from prox24_deploy.pipeline.ranks import (
    prune_by_processes,
    require_leader,
    require_text_for_all,
    shared,
    started_by_torchrun,
)
from prox24_deploy.pipeline.room import require_room
from prox24_deploy.report.assemble import Report

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir

_TIMING = BenchOptions()


def build(
    model_dir: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Progress
) -> Report:
    """Take a model directory to a sealed bundle in `out` and return its report.

    Stages whose inputs are unchanged since an earlier run in `out` are not run again.

    Raises:
        Prox24Error: any of its kinds; the stages finished until then are kept.
    """
    require_leader()
    # Read before any work, so that a wrong path costs no time.
    demands = read_demands(options)
    context = read_context(model_dir, out, options, progress)
    model = context.model
    dtype = _settled_dtype(context.source, context.recipe, options.dtype)
    options, limit = replace(options, dtype=dtype), options.memory_limit
    backends = open_backends(options.engine, model, RECOVERED if options.recover else PRUNED)
    _require_usable(context, options, backends)
    check_demands(demands, context, [backend.name for backend in backends], options)
    require_room(out, context, options, exports=True)
    begun = _begun_by_processes(model_dir, out, context, options, fresh=fresh, progress=progress)
    with open_bundle(out, fresh=fresh and not begun) as bundle:
        warn_beforehand(context, options)
        stages.tasks.verify(bundle, options.harness)
        context = stages.write.run(bundle, context, options, progress)
        with shared(options) as ranks:
            pruned = stages.prune.run(bundle, context, options, progress, ranks)
        recovered = stages.recover.run(bundle, context, options, progress)
        quantized = stages.quantize.run(bundle, context, pruned, options, progress)
        exported = stages.export.run(
            bundle, context.source, context.recipe, pruned, dtype, progress, memory_limit=limit
        )
        compiled = stages.compile.run(bundle, exported, context.recipe, backends, progress)
        results = BuildResults(
            prune=pruned,
            recover=recovered,
            quantize=quantized,
            export=exported,
            compile=compiled,
            bench=stages.bench.run(bundle, model, compiled, backends, options.engine, progress),
            evaluate=stages.evaluate.run(
                bundle, context, options.device, progress, memory_limit=limit
            ),
            accuracy=stages.accuracy.run(bundle, context, compiled, backends, options, progress),
            tasks=stages.tasks.run(bundle, context, options, progress),
        )
        return stages.report.run(bundle, context.source, context.recipe, results, demands)


def _require_usable(
    context: RunContext, options: BuildOptions, backends: Sequence[Backend]
) -> None:
    """Refuse what one of the stages would, before any of them has begun."""
    stages.tasks.require_usable(options.harness, context.recipe)
    stages.prune.require_usable(context, options)
    stages.recover.require_usable(options, context)
    stages.quantize.require_usable(options, context, backends)


def prune(
    model_dir: Path, out: Path, options: BuildOptions, *, fresh: bool, progress: Progress
) -> PruneResult:
    """Run only the pruning stage: `out` becomes a bundle with `pruned/`."""
    require_leader()
    context = read_context(model_dir, out, options, progress)
    stages.prune.require_usable(context, options)
    require_room(out, context, options)
    begun = _begun_by_processes(model_dir, out, context, options, fresh=fresh, progress=progress)
    with open_bundle(out, fresh=fresh and not begun) as bundle:
        warn_of_idle(options, context.recipe)
        context = stages.write.run(bundle, context, options, progress)
        with shared(options) as ranks:
            result = stages.prune.run(bundle, context, options, progress, ranks)
        stages.recover.forget_foreign(bundle)
        return result


def _begun_by_processes(
    model_dir: Path,
    out: Path,
    context: RunContext,
    options: BuildOptions,
    *,
    fresh: bool,
    progress: Progress,
) -> bool:
    """Whether the options ask for several processes; these have then pruned into `out`."""
    require_text_for_all(context, options)
    if options.gpus == 1 or started_by_torchrun():
        return False
    prune_by_processes(options.gpus, model_dir, out, options, fresh=fresh, progress=progress)
    return True


def help_to_prune(model_dir: Path, options: BuildOptions) -> None:
    """Take part in what process 0 of a run by torchrun prunes, by `build` or by `prune`.

    Raises:
        RankError: process 0 has other inputs, options or versions, or a process is gone.
        Prox24Error: what `prune` raises for the same model and options.
    """
    context = read_context(model_dir, None, options)
    stages.prune.require_usable(context, options)
    require_text_for_all(context, options)
    with shared(options) as ranks:
        if ranks is not None:
            stages.prune.help_with(context, options, ranks)


def recover(
    pruned: Path, teacher: Path, out: Path | None, options: BuildOptions, *, progress: Progress
) -> RecoverResult:
    """Run only the stage that recovers: on the bundle `pruned`, or on any into the bundle `out`.

    Without calibration in the options, a bundle that keeps what is recovered is on its own text.

    Raises:
        BundleError: `out` holds a model that was pruned there, or lies in what is read, or the
            bundle `pruned` does not say on what text it was pruned.
        ModelDirError: `teacher` is not what `pruned` was pruned from.
        UsageError: `options` say nothing of recovery, or there is nowhere to write.
        Prox24Error: what `build` raises for the same model and options.
    """
    if (asked := options.recover) is None:
        raise UsageError("There is no budget for the recovery; pass RecoverOptions(minutes=5).")
    from prox24_deploy.model.directory import open_model_dir
    from prox24_deploy.recovery.pair import require_pair
    from prox24_deploy.recovery.student import require_sparse

    own = stages.recover.is_own(pruned, out)
    if own and not options.text.calibration:
        options = replace(options, text=finish.text_as_pruned(pruned, options.text))
        context = _on_its_own_text(pruned, teacher, options, progress)
    else:
        context = read_context(teacher, out or pruned, options, progress)
    stages.recover.require_usable(options, context)
    student = open_model_dir(pruned / PRUNED if own else _sparse_path(pruned))
    # What no bundle could be recovered by comes before what this one cannot.
    require_pair(context.source, student, context.recipe)
    if own:
        stages.recover.require_teacher(pruned, context.source)
    require_sparse(student, context.recipe)
    with open_bundle(out or pruned, existing=own) as bundle:
        given = bundle.artifact(PRUNED) if own else student
        if not options.text.calibration:
            # Text that the model wrote to be pruned on stays where other text is given.
            context = stages.write.run(bundle, context, options, progress)
        result = stages.recover.run_on(bundle, given, context, options, asked, progress)
        stages.recover.note_options(bundle, asked)
        return result


def _on_its_own_text(
    bundle: Path, teacher: Path, options: BuildOptions, progress: Progress
) -> RunContext:
    try:
        return read_context(teacher, bundle, options, progress)
    except CalibrationError as error:
        if not options.text.calibration:
            raise
        raise CalibrationError(
            f"The text that {bundle} was pruned on cannot be used: {error} Or pass --calibration."
        ) from error


def export(
    out: Path, dtype: DType | None, *, quantize: Quantize | None = None, progress: Progress
) -> ExportResult:
    """Run only the export stage, on a bundle that holds a pruned model.

    A `dtype` of None means that of the checkpoint. With `quantize` the model is quantised before,
    on the samples that it was pruned on, or "none" any longer; None leaves that as it is.

    Raises:
        Prox24Error: what `build` raises for the same model and options.
    """
    with open_bundle(out, existing=True) as bundle:
        stages.recover.require_pruned_here(bundle.root, bundle.manifest)
        pruned = bundle.load(stages.prune.STAGE)
        source, recipe = source_of(bundle), open_model(bundle).recipe
        if quantize is not None:
            finish.quantize(bundle, pruned, source, quantize, progress)
        settled = _settled_dtype(source, recipe, dtype)
        return stages.export.run(bundle, source, recipe, pruned, settled, progress)


def compile_engines(
    out: Path, options: EngineOptions, *, quantize: Quantize | None = None, progress: Progress
) -> CompileResult:
    """Run only the compile stage, on a bundle that holds exported models.

    Engines are made of files that hold the 8-bit numbers, so that with `quantize` the model is
    exported again, as `export` does.
    """
    if quantize is not None:
        with open_bundle(out, existing=True) as bundle:
            dtype = bundle.load(stages.export.STAGE).sparse[0].dtype
        export(out, dtype, quantize=quantize, progress=progress)
    with open_bundle(out, existing=True) as bundle:
        stages.recover.require_pruned_here(bundle.root, bundle.manifest)
        exported = bundle.load(stages.export.STAGE)
        model = open_model(bundle)
        warn_of_lengths(options, model)
        backends = open_backends(options, model, shipped_folder(bundle.manifest.files))
        return stages.compile.run(bundle, exported, model.recipe, backends, progress)


def bench(
    out: Path,
    options: EngineOptions,
    *,
    timing: BenchOptions = _TIMING,
    progress: Progress,
) -> BenchResult:
    """Run only the bench stage, on a bundle that holds engines; always measures anew.

    Raises:
        BackendMissingError: no engine of the bundle can run on this machine.
    """
    with open_bundle(out, existing=True) as bundle:
        stages.recover.require_pruned_here(bundle.root, bundle.manifest)
        compiled = bundle.load(stages.compile.STAGE)
        model = open_model(bundle)
        warn_of_lengths(options, model)
        shipped = shipped_folder(bundle.manifest.files)
        backends, missing = backends_of(compiled, options, model, shipped)
        result = stages.bench.run(
            bundle,
            model,
            compiled,
            backends,
            options,
            progress,
            measure=stages.bench.measured_for(timing),
            anew=True,
        )
    result = replace(result, not_measured=(*missing, *result.not_measured))
    if not result.latency and result.not_measured:
        raise BackendMissingError(result.not_measured[0].reason)
    return result


def evaluate(
    dense: Path, pruned: Path, options: BuildOptions, *, progress: Progress
) -> EvaluateResult:
    """Compare a pruned model with its dense one in PyTorch; `pruned` may be a bundle.

    Raises:
        ModelDirError: a model cannot be opened, or the two are of different architectures.
        Prox24Error: what `build` raises for the same model and options.
    """
    from prox24_deploy.model.directory import open_model_dir

    context = read_context(dense, None, options, progress)
    sparse = open_model_dir(_sparse_path(pruned))
    if sparse.architecture != context.source.architecture:
        raise ModelDirError(
            f"Model directory {sparse.path} holds a {sparse.architecture}, expected a "
            f"{context.source.architecture} as in {dense}; pass the pruned model of that one."
        )
    device = torch_device(options.device).type
    result = stages.evaluate.compare_models(
        context.source,
        sparse,
        context.recipe,
        context.held_out,
        device,
        progress,
        memory_limit=options.memory_limit,
    )
    context.source.require_unchanged()
    sparse.require_unchanged()
    return replace(result, evaluation=context.held_out.source)


def _sparse_path(path: Path) -> Path:
    """The directory of the sparse model in a bundle, or the path itself where it is none."""
    if not (path / MANIFEST_FILE).is_file():
        return path
    return path / shipped_folder(read_manifest(path).files)


def _settled_dtype(source: "ModelDir", recipe: Recipe, asked: DType | None) -> DType:
    # Imports torch, which stages that are not run anew do without.
    from prox24_deploy.model.dtypes import settled_dtype

    return settled_dtype(source, recipe, asked)
