"""The stages of a build on the model itself: what each depends on, leaves behind, and calls.

The inputs of a stage are one frozen object, and its work sees nothing else. torch and the engines
are imported by the stage that needs them.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import LATE_FILES, ONNX, PRUNED, RECIPE, REPORT_FILES
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.limits import GivenLimits
from prox24_deploy.config.options import BuildOptions, DeviceChoice, PruneOptions
from prox24_deploy.config.recipe import Recipe
from prox24_deploy.core.accuracy import EngineAccuracyResult, TaskScores
from prox24_deploy.core.atomic import make_folder
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    EvaluateResult,
    ExportResult,
    NumericsCheck,
    OnnxModel,
    PruneResult,
)
from prox24_deploy.core.types import TWINS, DType, Progress, Twin
from prox24_deploy.packaging.card import read_source_card, write_card
from prox24_deploy.pipeline.context import Subject, model_of, torch_device, vocabulary_of
from prox24_deploy.regression.baseline import Gate
from prox24_deploy.regression.compare import held_against
from prox24_deploy.report.assemble import Report, assemble_report, write_report

if TYPE_CHECKING:
    from prox24_deploy.model.batch import Samples
    from prox24_deploy.model.directory import ModelDir


_STAGES = ("prune", "export", "compile", "bench", "evaluate", "accuracy", "tasks")
# Written when everything else is there.
_LAST_FILES = (*REPORT_FILES, *LATE_FILES)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneInputs:
    """What the pruned model depends on."""

    source: "ModelDir"
    recipe: Recipe
    calibration: "Samples"
    held_out: "Samples"
    options: PruneOptions
    device: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInputs:
    """What the ONNX files, their proof and their numerics depend on; `layers` were pruned."""

    source: "ModelDir"
    pruned: Artifact
    layers: tuple[str, ...]
    recipe: Recipe
    dtype: DType
    seed: int
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateInputs:
    """What the accuracy of both models in PyTorch depends on."""

    source: "ModelDir"
    pruned: Artifact
    held_out: "Samples"
    recipe: Recipe
    device: str
    versions: Mapping[str, str]


def prune_inputs(
    subject: Subject, options: PruneOptions, device_choice: DeviceChoice
) -> PruneInputs:
    """The inputs of the stage that prunes."""
    return PruneInputs(
        source=subject.directory,
        recipe=subject.recipe,
        calibration=subject.calibration,
        held_out=subject.held_out,
        options=options,
        device=torch_device(device_choice).type,
        versions=numeric_versions(),
    )


def prune(
    bundle: Bundle,
    subject: Subject,
    options: BuildOptions,
    progress: Progress,
) -> PruneResult:
    """Prune every target layer into `pruned/`; the bundle is then one of this model."""
    inputs = prune_inputs(subject, options.prune, options.device)
    result = bundle.run(PRUNE, inputs, progress)
    _describe(bundle, subject, options)
    # The same samples may come from another place than when they were pruned on.
    return replace(result, calibration=subject.calibration.source, held_out=subject.held_out.source)


def export(
    bundle: Bundle,
    source: "ModelDir",
    recipe: Recipe,
    pruned: PruneResult,
    dtype: DType,
    progress: Progress,
) -> ExportResult:
    """Export dense and sparse twins to `onnx/`, prove 2:4 and compare numerics."""
    inputs = ExportInputs(
        source=source,
        pruned=bundle.artifact(PRUNED),
        layers=tuple(layer.name for layer in pruned.layers if layer.status == "pruned"),
        recipe=recipe,
        dtype=dtype,
        seed=bundle.manifest.seed,
        versions=numeric_versions(),
    )
    return bundle.run(EXPORT, inputs, progress)


def evaluate(
    bundle: Bundle, subject: Subject, device_choice: DeviceChoice, progress: Progress
) -> EvaluateResult:
    """Compare dense and pruned model on held-out samples."""
    inputs = EvaluateInputs(
        source=subject.directory,
        pruned=bundle.artifact(PRUNED),
        held_out=subject.held_out,
        recipe=subject.recipe,
        device=torch_device(device_choice).type,
        versions=numeric_versions(),
    )
    return replace(bundle.run(EVALUATE, inputs, progress), evaluation=subject.held_out.source)


def report(
    bundle: Bundle,
    subject: Subject,
    pruned: PruneResult,
    exported: ExportResult,
    compiled: CompileResult,
    measured: BenchResult,
    evaluated: EvaluateResult,
    gate: Gate | None = None,
    through: EngineAccuracyResult | None = None,
    tasks: TaskScores | None = None,
    given: GivenLimits | None = None,
) -> Report:
    """Assemble the report, hold it against a baseline, write its views and the card, and seal."""
    manifest = bundle.manifest
    bundle.promise(_LAST_FILES)
    made = assemble_report(
        model_of(bundle),
        {**manifest.options, "recipe_sha256": subject.recipe.sha256},
        {**manifest.versions, **_engine_versions(compiled), **manifest.machine},
        pruned,
        evaluated,
        exported,
        compiled,
        measured,
        {n: entry.size for n, entry in sorted(manifest.files.items()) if n not in _LAST_FILES},
        {name: manifest.stages[name].seconds for name in _STAGES if name in manifest.stages},
        subject.recipe.limits,
        through=through or EngineAccuracyResult(),
        tasks=tasks,
        given=given or GivenLimits(),
    )
    if gate:
        made = held_against(made, gate.baseline, limits=gate.limits, allow=gate.allow)
    card = read_source_card(subject.directory.path)
    # Nothing reads the source after its card.
    subject.directory.require_unchanged()
    write_card(made, card, bundle.root / PRUNED)
    write_report(made, bundle.root)
    manifest.verdict = made.verdict
    bundle.seal(_LAST_FILES)
    return made


def _describe(bundle: Bundle, subject: Subject, options: BuildOptions) -> None:
    """Enter in the manifest what the pruned model in the bundle was made from and by what."""
    from prox24_deploy.model.directory import model_info

    manifest = bundle.manifest
    manifest.model = model_info(subject.directory, subject.recipe, name=subject.name)
    manifest.recipe = subject.recipe_text
    manifest.options = json.loads(json.dumps(asdict(options), default=str))
    manifest.seed = options.text.seed
    manifest.versions = versions()
    manifest.machine = machine()
    manifest.complete = False
    bundle.write_late(RECIPE, subject.recipe_text.encode())


def _run_prune(inputs: PruneInputs, work: Workspace, progress: Progress) -> PruneResult:
    import torch

    from prox24_deploy.pruning.prune import prune_directory

    return prune_directory(
        inputs.source,
        inputs.recipe,
        inputs.calibration,
        inputs.held_out,
        inputs.options,
        device=torch.device(inputs.device),
        solved=work.kept,
        out=work.partial / PRUNED,
        progress=progress,
    )


def _run_evaluate(inputs: EvaluateInputs, _: Workspace, progress: Progress) -> EvaluateResult:
    import torch

    from prox24_deploy.evaluation.evaluate import evaluate_models
    from prox24_deploy.model.directory import load_model, open_model_dir

    dense_model, sparse_model = (
        load_model(directory, inputs.recipe, torch.device(inputs.device))
        for directory in (inputs.source, open_model_dir(inputs.pruned.path))
    )
    return evaluate_models(
        dense_model,
        sparse_model,
        inputs.recipe.task,
        inputs.held_out,
        inputs.source.path,
        progress,
    )


def _run_export(inputs: ExportInputs, work: Workspace, progress: Progress) -> ExportResult:
    from prox24_deploy.graph.check.check import check_onnx
    from prox24_deploy.model.directory import open_model_dir

    began = time.perf_counter()
    directories = {"dense": inputs.source, "sparse": open_model_dir(inputs.pruned.path)}
    exported: dict[Twin, tuple[OnnxModel, ...]] = {}
    numerics: list[NumericsCheck] = []
    for i, twin in enumerate(TWINS):
        progress("export", i, len(TWINS))
        exported[twin], found = _export_twin(inputs, twin, directories[twin], work.partial)
        numerics += found
    progress("export", len(TWINS), len(TWINS))
    files = [work.partial / model.path for model in exported["sparse"]]
    sparsity = tuple(check for file in files for check in check_onnx(file))
    seconds = time.perf_counter() - began
    return ExportResult(exported["dense"], exported["sparse"], sparsity, tuple(numerics), seconds)


def _export_twin(
    inputs: ExportInputs, twin: Twin, directory: "ModelDir", partial: Path
) -> tuple[tuple[OnnxModel, ...], list[NumericsCheck]]:
    """Export one twin below `partial`, and compare each graph with PyTorch."""
    from prox24_deploy.graph.export.export import export_graphs, hash_onnx
    from prox24_deploy.graph.parity.numerics import compare_with_torch
    from prox24_deploy.model.directory import load_model

    recipe = inputs.recipe
    module = load_model(directory, recipe, torch_device("cpu"))
    folder = partial / ONNX / twin
    make_folder(folder.parent)
    paths = export_graphs(
        module,
        recipe,
        folder,
        dtype=inputs.dtype,
        sparse=inputs.layers if twin == "sparse" else (),
    )
    numerics: list[NumericsCheck] = []
    for part, path in zip(recipe.parts, paths, strict=True):
        numerics += compare_with_torch(
            module,
            path,
            part,
            dtype=inputs.dtype,
            twin=twin,
            vocabulary=vocabulary_of(inputs.source.config),
            seed=inputs.seed,
        )
    files = tuple(
        OnnxModel(f"{ONNX}/{twin}/{path.name}", inputs.dtype, recipe.opset, *hash_onnx(path))
        for path in paths
    )
    return files, numerics


PRUNE = Stage(name="prune", result=PruneResult, run=_run_prune, outputs=(PRUNED,))
EXPORT = Stage(name="export", result=ExportResult, run=_run_export, outputs=(ONNX,))
EVALUATE = Stage(name="evaluate", result=EvaluateResult, run=_run_evaluate)


def _engine_versions(compiled: CompileResult) -> dict[str, str]:
    return {name: text for engine in compiled.engines for name, text in engine.versions.items()}


def numeric_versions() -> dict[str, str]:
    """Versions that can change a bit of the result."""
    known = versions()
    return {name: known[name] for name in _NUMERIC}


_NUMERIC = ("torch", "transformers", "numpy", "numba", "onnx", "onnxscript", "onnx-ir")
