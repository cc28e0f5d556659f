"""The stages of a build on the model itself: what each depends on, leaves behind, and calls.

The rooms know nothing of bundles; this module hands each its inputs and stores what it returns.
torch and the engines are imported by the stage that needs them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from prox24_deploy.accuracy import EngineAccuracyResult, TaskScores
from prox24_deploy.artifacts import (
    BenchResult,
    CompileResult,
    DType,
    EvaluateResult,
    ExportResult,
    ModelInfo,
    NumericsCheck,
    OnnxModel,
    PruneResult,
)
from prox24_deploy.errors import BundleError
from prox24_deploy.limits import GivenLimits
from prox24_deploy.options import BuildOptions, DeviceChoice, PruneOptions
from prox24_deploy.release.baseline import Gate
from prox24_deploy.release.bundle import LATE_FILES, Bundle, stage_key
from prox24_deploy.release.card import read_source_card, write_card
from prox24_deploy.release.compare import held_against
from prox24_deploy.release.environment import machine, versions
from prox24_deploy.release.manifest import write_manifest
from prox24_deploy.release.report import Report, assemble_report, write_report
from prox24_deploy.subject import (
    Subject,
    model_of,
    recipe_of,
    torch_device,
    vocabulary_of,
)

Progress = Callable[[str, int, int], None]
Twin = Literal["dense", "sparse"]

TWINS: tuple[Twin, ...] = ("dense", "sparse")
_STAGES = ("prune", "export", "compile", "bench", "evaluate", "accuracy", "tasks")
_REPORT_FILES = (
    "report.json", "report.html", "summary.md", "junit.xml", "benchmark.json", *LATE_FILES,
)  # fmt: skip


def describe(bundle: Bundle, subject: Subject, options: BuildOptions) -> None:
    """Enter model, recipe, options and machine in the manifest."""
    from prox24_deploy.model.directory import model_info

    manifest = bundle.manifest
    manifest.model = model_info(subject.directory, subject.recipe)
    manifest.recipe = subject.recipe_text
    manifest.options = json.loads(json.dumps(asdict(options), default=str))
    manifest.seed = options.text.seed
    manifest.versions = versions()
    manifest.machine = machine()
    manifest.complete = False
    write_manifest(bundle.root, manifest)


def prune(
    bundle: Bundle,
    subject: Subject,
    options: PruneOptions,
    device_choice: DeviceChoice,
    progress: Progress,
) -> PruneResult:
    """Prune every target layer and write `pruned/`."""
    device = torch_device(device_choice)
    inputs = {
        "model": subject.directory.sha256,
        "recipe": subject.recipe_text,
        "calibration": asdict(subject.calibration.source),
        "held_out": asdict(subject.held_out.source),
        "options": asdict(options),
        "device": device.type,
        "versions": _numeric_versions(),
    }
    solved = bundle.partial / f"blocks-{stage_key('prune', inputs)[:16]}"

    def run() -> PruneResult:
        from prox24_deploy.model.prune import prune_directory

        bundle.clean_partial(keep=solved)
        result = prune_directory(
            subject.directory,
            subject.recipe,
            subject.recipe_text,
            subject.calibration,
            subject.held_out,
            options,
            device=device,
            solved=solved,
            out=bundle.partial / "pruned",
            progress=progress,
        )
        bundle.publish(bundle.partial / "pruned", "pruned")
        return result

    return bundle.stage("prune", PruneResult, inputs, ["pruned"], run)


def export(bundle: Bundle, dtype: DType, progress: Progress) -> ExportResult:
    """Export dense and sparse twins to `onnx/`, prove 2:4 and compare numerics."""
    pruned = bundle.load("prune", PruneResult)
    model = model_of(bundle)
    inputs = {
        "model": model.sha256,
        "pruned": pruned.state_sha256,
        "recipe": bundle.manifest.recipe,
        "dtype": dtype,
        "seed": bundle.manifest.seed,
        "versions": _numeric_versions(),
    }

    def run() -> ExportResult:
        bundle.clean_partial()
        result = _export_twins(bundle, model, pruned, dtype, progress)
        bundle.publish(bundle.partial / "onnx", "onnx")
        return result

    return bundle.stage("export", ExportResult, inputs, ["onnx"], run)


def evaluate(
    bundle: Bundle, subject: Subject, device_choice: DeviceChoice, progress: Progress
) -> EvaluateResult:
    """Compare dense and pruned model on held-out text."""
    device = torch_device(device_choice)
    inputs = {
        "model": subject.directory.sha256,
        "pruned": bundle.load("prune", PruneResult).state_sha256,
        "evaluation": asdict(subject.held_out.source),
        "device": device.type,
        "versions": _numeric_versions(),
    }

    def run() -> EvaluateResult:
        from prox24_deploy.model.directory import load_model, open_model_dir
        from prox24_deploy.model.evaluate import evaluate_models

        pruned = open_model_dir(bundle.root / "pruned")
        dense_model, sparse_model = (
            load_model(directory, subject.recipe, device)
            for directory in (subject.directory, pruned)
        )
        return evaluate_models(
            dense_model,
            sparse_model,
            subject.recipe.task,
            subject.held_out,
            subject.directory.path,
            progress,
            embedding=subject.recipe.embedding,
        )

    return bundle.stage("evaluate", EvaluateResult, inputs, [], run)


def report(
    bundle: Bundle,
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
    made = assemble_report(
        model_of(bundle),
        {**manifest.options, "recipe_sha256": recipe_of(bundle).sha256},
        {**manifest.versions, **_engine_versions(compiled), **manifest.machine},
        pruned,
        evaluated,
        exported,
        compiled,
        measured,
        {n: entry.size for n, entry in sorted(manifest.files.items()) if n not in _REPORT_FILES},
        {name: manifest.stages[name].seconds for name in _STAGES if name in manifest.stages},
        recipe_of(bundle).limits,
        through=through or EngineAccuracyResult(),
        tasks=tasks,
        given=given or GivenLimits(),
    )
    if gate:
        made = held_against(made, gate.baseline, limits=gate.limits, allow=gate.allow)
    write_card(made, read_source_card(Path(model_of(bundle).path)), bundle.root / "pruned")
    write_report(made, bundle.root)
    manifest.verdict = made.verdict
    bundle.seal(_REPORT_FILES)
    return made


def _export_twins(
    bundle: Bundle, model: ModelInfo, pruned: PruneResult, dtype: DType, progress: Progress
) -> ExportResult:
    from prox24_deploy.graph.check import check_onnx
    from prox24_deploy.graph.export import export_graphs, hash_onnx
    from prox24_deploy.graph.numerics import compare_with_torch
    from prox24_deploy.model.directory import load_model, open_model_dir

    began = time.perf_counter()
    recipe = recipe_of(bundle)
    dense = open_model_dir(Path(model.path))
    if dense.sha256 != model.sha256:
        raise BundleError(
            f"Model directory {model.path} has changed since {bundle.root} was pruned; run prune "
            "again."
        )
    names = [layer.name for layer in pruned.layers if layer.status == "pruned"]
    exported: dict[Twin, tuple[OnnxModel, ...]] = {}
    numerics: list[NumericsCheck] = []
    for i, twin in enumerate(TWINS):
        progress("export", i, len(TWINS))
        directory = dense if twin == "dense" else open_model_dir(bundle.root / "pruned")
        module = load_model(directory, recipe, torch_device("cpu"))
        folder = bundle.partial / "onnx" / twin
        folder.parent.mkdir(parents=True, exist_ok=True)
        paths = export_graphs(
            module, recipe, folder, dtype=dtype, sparse=names if twin == "sparse" else ()
        )
        for part, path in zip(recipe.parts, paths, strict=True):
            numerics += compare_with_torch(
                module,
                path,
                part,
                dtype=dtype,
                twin=twin,
                vocabulary=vocabulary_of(dense.config),
                seed=bundle.manifest.seed,
            )
        exported[twin] = tuple(
            OnnxModel(f"onnx/{twin}/{path.name}", dtype, recipe.opset, *hash_onnx(path))
            for path in paths
        )
    progress("export", len(TWINS), len(TWINS))
    files = [bundle.partial / model.path for model in exported["sparse"]]
    sparsity = tuple(check for file in files for check in check_onnx(file))
    seconds = time.perf_counter() - began
    return ExportResult(exported["dense"], exported["sparse"], sparsity, tuple(numerics), seconds)


def _engine_versions(compiled: CompileResult) -> dict[str, str]:
    return {name: text for engine in compiled.engines for name, text in engine.versions.items()}


def _numeric_versions() -> dict[str, str]:
    """Versions that can change a bit of the result."""
    known = versions()
    return {
        name: known[name] for name in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
    }
