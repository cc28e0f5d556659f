"""The end of a run in single stages: accuracy of what a bundle holds, and its report."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from prox24_deploy.bundle.bundle import Bundle, open_bundle
from prox24_deploy.bundle.layout import shipped_folder
from prox24_deploy.bundle.manifest import Manifest, read_manifest
from prox24_deploy.config.options import BuildOptions, DeviceChoice, EngineOptions, TextOptions
from prox24_deploy.core.accuracy import EngineAccuracyResult
from prox24_deploy.core.documents import first_problem
from prox24_deploy.core.errors import BundleError
from prox24_deploy.core.records import EvaluateResult, PruneResult
from prox24_deploy.core.results import STAGE_NAMES, BuildResults
from prox24_deploy.core.types import Progress, Quantize
from prox24_deploy.pipeline import stages
from prox24_deploy.pipeline.backends import backends_of
from prox24_deploy.pipeline.context import (
    fitted_recipe,
    model_of,
    open_model,
    read_context,
    source_of,
)
from prox24_deploy.pipeline.demands import read_demands
from prox24_deploy.report.assemble import Report

if TYPE_CHECKING:
    from prox24_deploy.model.directory import ModelDir

# Without them there is no report; what else a bundle holds is told, too.
_REQUIRED = ("prune", "export", "compile", "bench", "evaluate", "accuracy")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationAsked:
    """What `evaluate` takes; None leaves a setting to how the bundle was pruned.

    `model` is where the dense model lies, if not where it was.
    """

    evaluation: tuple[Path, ...] = ()
    column: str | None = None
    target_column: str | None = None
    evaluation_tokens: int | None = None
    engine_tokens: int | None = None
    device: DeviceChoice = "auto"
    model: Path | None = None


def evaluate(
    out: Path, asked: EvaluationAsked, *, progress: Progress
) -> tuple[EvaluateResult, EngineAccuracyResult]:
    """Run the stages that measure accuracy, in PyTorch and through the engines of a bundle.

    Raises:
        BundleError: it was not pruned and compiled, or the model that it is of has changed.
        Prox24Error: what `build` raises for the same model and options.
    """
    with open_bundle(out, existing=True) as bundle:
        stages.recover.require_pruned_here(bundle.root, bundle.manifest)
        compiled = bundle.load(stages.compile.STAGE)
        # Refuses a model that has changed.
        source = source_of(bundle, asked.model)
        options = _with(stored_options(bundle), asked, bundle)
        context = read_context(source.path, out, options, progress)
        shipped = shipped_folder(bundle.manifest.files)
        backends, missing = backends_of(compiled, options.engine, context.model, shipped)
        evaluated = stages.evaluate.run(bundle, context, options.device, progress)
        through = stages.accuracy.run(bundle, context, compiled, backends, options, progress)
        bundle.manifest.options = _as_json(options)
        bundle.save()
    return evaluated, replace(through, not_measured=(*missing, *through.not_measured))


def report(out: Path, options: BuildOptions, model: Path | None = None) -> Report:
    """Report what the stages of a bundle found, and seal it: the end of a run in single stages.

    Of the options count what the report is held to: baseline, limits, accepted losses. `model` is
    where the dense model lies, if not where it was.

    Raises:
        BundleError: a stage has not been run, or the model that it is of has changed.
        UsageError: a limit names no figure.
    """
    demands = read_demands(options)
    with open_bundle(out, existing=True) as bundle:
        stages.recover.require_pruned_here(bundle.root, bundle.manifest)
        results = _results(bundle)
        source = source_of(bundle, model)
        recipe = fitted_recipe(open_model(bundle).recipe, source.architecture, source.path)
        bundle.manifest.options = {
            **bundle.manifest.options,
            **_told(bundle, results),
            "baseline": str(options.baseline) if options.baseline else None,
            "limits_file": str(options.limits_file) if options.limits_file else None,
            "allow": [*options.allow],
            "accept_loss": [[*each] for each in options.accept_loss],
        }
        bundle.save()
        return stages.report.run(bundle, source, recipe, results, demands)


def quantize(
    bundle: Bundle, pruned: PruneResult, source: "ModelDir", format: Quantize, progress: Progress
) -> None:
    """Run the stage that quantises on a pruned bundle, or take back what it left.

    Raises:
        CalibrationError: there are too few calibration samples for ranges.
        Prox24Error: what `build` raises for the same model and options.
    """
    asked = None if format == "none" else format
    options = replace(stored_options(bundle), quantize=asked)
    context = read_context(source.path, bundle.root, options, progress)
    stages.quantize.require_usable(options, context, ())
    context = stages.write.run(bundle, context, options, progress)
    stages.quantize.run(bundle, context, pruned, options, progress)
    bundle.manifest.options = {**bundle.manifest.options, "quantize": asked}
    bundle.save()


def stored_options(bundle: Bundle) -> BuildOptions:
    """The options that a bundle was pruned by, as its manifest has them.

    Raises:
        BundleError: they are not those of a build by this version.
    """
    return _options_in(bundle.manifest, bundle.root)


def text_as_pruned(root: Path, asked: TextOptions) -> TextOptions:
    """The text that a bundle was pruned on, but for settings that are not at their defaults.

    Raises:
        BundleError: the options of the bundle are not those of a build by this version.
    """
    known = _options_in(read_manifest(root), root).text
    given = {each.name: getattr(asked, each.name) for each in fields(asked)}
    defaults = {each.name: each.default for each in fields(asked)}
    return replace(known, **{name: v for name, v in given.items() if v != defaults[name]})


def _options_in(manifest: Manifest, root: Path) -> BuildOptions:
    try:
        return TypeAdapter(BuildOptions).validate_json(json.dumps(manifest.options))
    except ValidationError as error:
        where, what = first_problem(error)
        raise BundleError(
            f"The options in {root} are damaged at {where!r}: {what}; run prune again."
        ) from error


def _with(options: BuildOptions, asked: EvaluationAsked, bundle: Bundle) -> BuildOptions:
    """The options with what was asked for, and the shapes that the engines were timed at."""
    text = replace(
        options.text,
        evaluation=asked.evaluation or options.text.evaluation,
        column=asked.column or options.text.column,
        target_column=asked.target_column or options.text.target_column,
        evaluation_tokens=asked.evaluation_tokens or options.text.evaluation_tokens,
    )
    return replace(
        options,
        text=text,
        engine=_timed(options.engine, bundle),
        engine_tokens=asked.engine_tokens or options.engine_tokens,
        device=asked.device,
        name=options.name or model_of(bundle).name or None,
    )


def _timed(options: EngineOptions, bundle: Bundle) -> EngineOptions:
    shapes = _shapes(bundle)
    if not shapes:
        return options
    return replace(
        options,
        batches=shapes["batches"],
        sequences=shapes["sequences"],
        pasts=shapes["pasts"],
    )


def _shapes(bundle: Bundle) -> dict[str, tuple[int, ...]]:
    """The shapes at which the engines of a bundle were timed, none where they were not."""
    if "bench" not in bundle.manifest.stages:
        return {}
    inputs = bundle.manifest.stages["bench"].inputs
    return {name: tuple(inputs.get(name, ())) for name in ("batches", "sequences", "pasts")}


def _results(bundle: Bundle) -> BuildResults:
    every = [getattr(stages, name).STAGE for name in STAGE_NAMES]
    return BuildResults(
        **{
            stage.name: bundle.load(stage)
            for stage in every
            if stage.name in _REQUIRED or stage.name in bundle.manifest.stages
        }
    )


def _told(bundle: Bundle, results: BuildResults) -> dict[str, Any]:
    """What the stages were told after `prune`, as the options of one build would have it."""
    backends = list(dict.fromkeys(engine.backend for engine in results.compile.engines))
    shapes = {name: [*extents] for name, extents in _shapes(bundle).items()}
    engine = {**bundle.manifest.options["engine"], **shapes, "backends": backends}
    return {"dtype": results.export.sparse[0].dtype, "engine": engine}


def _as_json(options: BuildOptions) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return found
