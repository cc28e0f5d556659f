"""Each stage of a build: what it depends on, what it leaves in the bundle, who does the work.

The rooms know nothing of bundles; this module hands each its inputs and stores what it returns.
torch and the engines are imported by the stage that needs them.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prox24_deploy.artifacts import (
    BenchResult,
    CompileResult,
    DType,
    Engine,
    EvaluateResult,
    ExportResult,
    LatencyRow,
    ModelInfo,
    NotMeasured,
    NumericsCheck,
    OnnxModel,
    PruneResult,
)
from prox24_deploy.engines import Origin, backend_by_name
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.errors import BackendMissingError, BundleError
from prox24_deploy.options import BuildOptions, DeviceChoice, EngineOptions, PruneOptions
from prox24_deploy.recipe import Recipe, parse_recipe
from prox24_deploy.release.bundle import LATE_FILES, Bundle, stage_key
from prox24_deploy.release.card import read_source_card, write_card
from prox24_deploy.release.environment import machine, versions
from prox24_deploy.release.manifest import write_manifest
from prox24_deploy.release.measure import conditions, measure_latency
from prox24_deploy.release.report import Report, assemble_report, write_report
from prox24_deploy.subject import Subject, fitted_recipe, fitted_shapes

if TYPE_CHECKING:
    import torch

    from prox24_deploy.engines.profile import GpuProfile

Progress = Callable[[str, int, int], None]
Twin = Literal["dense", "sparse"]

TWINS: tuple[Twin, ...] = ("dense", "sparse")
_STAGES = ("prune", "export", "compile", "bench", "evaluate")
_REPORT_FILES = (
    "report.json", "report.html", "summary.md", "junit.xml", "benchmark.json", *LATE_FILES,
)  # fmt: skip


def open_backends(
    options: EngineOptions, dense: Path, recipe: Recipe, config: dict[str, Any]
) -> tuple[Backend, ...]:
    """The backends asked for, each once.

    Args:
        options: names the backends and the shapes.
        dense: the dense model directory.
        recipe: that fits the model.
        config: of the model.

    Raises:
        BackendMissingError: one is not available here.
    """
    fitted = fitted_shapes(options, config, recipe)
    origin = Origin(dense, recipe, planned_gemms(options.plan))
    backends = (backend_by_name(name, fitted, origin) for name in options.backends)
    return tuple({backend.name: backend for backend in backends}.values())


def backends_of(bundle: Bundle, options: EngineOptions) -> tuple[Backend, ...]:
    """The backends asked for, for the model of a bundle."""
    return open_backends(options, Path(_model(bundle).path), _recipe(bundle), _config(bundle))


def planned_gemms(plan: Path | None) -> "GpuProfile | None":
    """The GEMM timings that a plan was made from.

    Raises:
        UsageError: the file is no plan.
    """
    if plan is None:
        return None
    from prox24_deploy.engines.planning import read_plan

    return read_plan(plan).profile


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
    model = _model(bundle)
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


def compile_engines(
    bundle: Bundle, exported: ExportResult, backends: Sequence[Backend], progress: Progress
) -> CompileResult:
    """Compile both twins with every backend into `engines/BACKEND/TWIN/`."""
    inputs = {
        "dense": exported.dense.sha256,
        "sparse": exported.sparse.sha256,
        # All backends are dataclasses, so that this tells every option.
        "backends": {backend.name: [backend.device(), repr(backend)] for backend in backends},
        "versions": versions(),
    }

    def run() -> CompileResult:
        began = time.perf_counter()
        engines: list[Engine] = []
        evidence = []
        for i, backend in enumerate(backends):
            for j, twin in enumerate(TWINS):
                progress("compile", 2 * i + j, 2 * len(backends))
                model = exported.dense if twin == "dense" else exported.sparse
                out = Path("engines") / backend.name / twin
                engines.append(backend.build(bundle.root, model, out, twin=twin))
            evidence.append(backend.evidence(bundle.root, engines[-1], exported.sparsity))
        progress("compile", 2 * len(backends), 2 * len(backends))
        return CompileResult(tuple(engines), tuple(evidence), time.perf_counter() - began)

    return bundle.stage("compile", CompileResult, inputs, ["engines"], run)


def bench(
    bundle: Bundle,
    compiled: CompileResult,
    backends: Sequence[Backend],
    options: EngineOptions,
    progress: Progress,
) -> BenchResult:
    """Time dense against sparse with every backend at every shape."""
    recipe = _recipe(bundle)
    fitted = fitted_shapes(options, _config(bundle), recipe)
    shapes = fitted.shapes(images=recipe.reads_images)
    inputs = {
        "engines": [asdict(engine) for engine in compiled.engines],
        "shapes": [list(shape) for shape in shapes],
        "limit": recipe.limits.max_slowdown,
        "machine": machine(),
    }

    def run() -> BenchResult:
        from prox24_deploy.graph.signature import read_inputs

        began = time.perf_counter()
        rows: list[LatencyRow] = []
        not_measured: list[NotMeasured] = []
        engine = compiled.engines[0]
        graph_inputs = read_inputs(bundle.root / engine.onnx)
        feeds = random_feeds(graph_inputs, engine.dtype, _vocabulary(_config(bundle)))
        for i, backend in enumerate(backends):
            pair = {e.twin: e for e in compiled.engines if e.backend == backend.name}
            advance = partial(_advance, progress, i * len(shapes), len(backends) * len(shapes))
            advance(0)
            try:
                rows += measure_latency(
                    backend,
                    bundle.root,
                    pair["dense"],
                    pair["sparse"],
                    shapes,
                    feeds,
                    recipe.limits.max_slowdown,
                    after_shape=advance,
                )
            except BackendMissingError as error:
                # Built for another machine; the report says so by name.
                not_measured.append(NotMeasured(backend.name, str(error)))
        progress("bench", len(backends) * len(shapes), len(backends) * len(shapes))
        seconds = time.perf_counter() - began
        return BenchResult(tuple(rows), conditions(), seconds, tuple(not_measured))

    return bundle.stage("bench", BenchResult, inputs, [], run)


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
) -> Report:
    """Assemble the report from the stages' results, write its views, the card, and seal."""
    manifest = bundle.manifest
    made = assemble_report(
        _model(bundle),
        manifest.options,
        {**manifest.versions, **_engine_versions(compiled), **manifest.machine},
        pruned,
        evaluated,
        exported,
        compiled,
        measured,
        {n: entry.size for n, entry in sorted(manifest.files.items()) if n not in _REPORT_FILES},
        {name: manifest.stages[name].seconds for name in _STAGES},
        _recipe(bundle).limits,
    )
    write_card(made, read_source_card(Path(_model(bundle).path)), bundle.root / "pruned")
    write_report(made, bundle.root)
    manifest.verdict = made.verdict
    bundle.seal(_REPORT_FILES)
    return made


def _export_twins(
    bundle: Bundle, model: ModelInfo, pruned: PruneResult, dtype: DType, progress: Progress
) -> ExportResult:
    from prox24_deploy.graph.check import check_onnx
    from prox24_deploy.graph.export import export_onnx, hash_onnx
    from prox24_deploy.graph.numerics import compare_with_torch
    from prox24_deploy.model.directory import load_model, open_model_dir

    began = time.perf_counter()
    recipe = _recipe(bundle)
    dense = open_model_dir(Path(model.path))
    if dense.sha256 != model.sha256:
        raise BundleError(
            f"Model directory {model.path} has changed since {bundle.root} was pruned; run prune "
            "again."
        )
    names = [layer.name for layer in pruned.layers if layer.status == "pruned"]
    exported: dict[Twin, OnnxModel] = {}
    numerics: list[NumericsCheck] = []
    for i, twin in enumerate(TWINS):
        progress("export", i, len(TWINS))
        directory = dense if twin == "dense" else open_model_dir(bundle.root / "pruned")
        module = load_model(directory, recipe, torch_device("cpu"))
        folder = bundle.partial / "onnx" / twin
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = export_onnx(
            module, recipe, folder, dtype=dtype, sparse=names if twin == "sparse" else ()
        )
        numerics += compare_with_torch(
            module,
            path,
            recipe,
            dtype=dtype,
            twin=twin,
            vocabulary=_vocabulary(dense.config),
            seed=bundle.manifest.seed,
        )
        sha256, size = hash_onnx(folder)
        exported[twin] = OnnxModel(f"onnx/{twin}/{path.name}", dtype, recipe.opset, sha256, size)
    progress("export", len(TWINS), len(TWINS))
    sparsity = check_onnx(bundle.partial / "onnx" / "sparse" / "model.onnx")
    seconds = time.perf_counter() - began
    return ExportResult(exported["dense"], exported["sparse"], sparsity, tuple(numerics), seconds)


def _model(bundle: Bundle) -> ModelInfo:
    if bundle.manifest.model is None:
        raise BundleError(f"Bundle {bundle.root} names no model; run prune first.")
    return bundle.manifest.model


def _recipe(bundle: Bundle) -> Recipe:
    whole = parse_recipe(bundle.manifest.recipe, f"of {bundle.root}")
    return fitted_recipe(whole, _model(bundle).architecture, bundle.root / "pruned")


def _config(bundle: Bundle) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((bundle.root / "pruned" / "config.json").read_bytes())
    return config


def _vocabulary(config: dict[str, Any]) -> int:
    """Number of tokens; 1 for a model that reads none."""
    return int(config.get("vocab_size", 1))


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress("bench", before + done, total)


def torch_device(choice: DeviceChoice) -> "torch.device":
    """The device that `--device` asks for.

    Raises:
        BackendMissingError: torch finds no CUDA device.
    """
    import torch

    if choice == "cuda" and not torch.cuda.is_available():
        raise BackendMissingError(
            "Device 'cuda' was asked for, but torch finds no CUDA device; pass --device cpu or "
            "install a CUDA build of torch."
        )
    use_cuda = choice == "cuda" or (choice == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _engine_versions(compiled: CompileResult) -> dict[str, str]:
    return {name: text for engine in compiled.engines for name, text in engine.versions.items()}


def _numeric_versions() -> dict[str, str]:
    """Versions that can change a bit of the result."""
    known = versions()
    return {
        name: known[name] for name in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
    }
