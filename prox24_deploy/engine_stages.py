"""The stages of a build on engines: compile them, and time dense against sparse."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prox24_deploy.artifacts import (
    BenchResult,
    CompileResult,
    Engine,
    EngineEvidence,
    ExportResult,
    LatencyRow,
    NotMeasured,
    OnnxModel,
    TensorCheck,
)
from prox24_deploy.engines import Origin, backend_by_name
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.errors import BackendMissingError
from prox24_deploy.options import EngineOptions
from prox24_deploy.recipe import Recipe, dynamic_names
from prox24_deploy.release.bundle import Bundle
from prox24_deploy.release.environment import machine, versions
from prox24_deploy.release.measure import conditions, measure_latency
from prox24_deploy.stages import TWINS, Twin
from prox24_deploy.subject import config_of, fitted_shapes, model_of, recipe_of, vocabulary_of

if TYPE_CHECKING:
    from prox24_deploy.engines.profile import GpuProfile

Progress = Callable[[str, int, int], None]


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
    return open_backends(options, Path(model_of(bundle).path), recipe_of(bundle), config_of(bundle))


def planned_gemms(plan: Path | None) -> "GpuProfile | None":
    """The GEMM timings that a plan was made from.

    Raises:
        UsageError: the file is no plan.
    """
    if plan is None:
        return None
    from prox24_deploy.engines.planning import read_plan

    return read_plan(plan).profile


def compile_engines(
    bundle: Bundle, exported: ExportResult, backends: Sequence[Backend], progress: Progress
) -> CompileResult:
    """Compile both twins with every backend into `engines/BACKEND/TWIN/`.

    Encoder and decoder get a folder each in there.
    """
    inputs = {
        "dense": [model.sha256 for model in exported.dense],
        "sparse": [model.sha256 for model in exported.sparse],
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
                for model in exported.dense if twin == "dense" else exported.sparse:
                    out = _engine_folder(backend, twin, model)
                    engines.append(backend.build(bundle.root, model, out, twin=twin))
            evidence += _evidence(bundle, backend, engines, exported.sparsity)
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
    recipe = recipe_of(bundle)
    fitted = fitted_shapes(options, config_of(bundle), recipe)
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
        vocabulary = vocabulary_of(config_of(bundle))
        graphs = list(dict.fromkeys(engine.graph for engine in compiled.engines))
        runs = [(backend, graph) for backend in backends for graph in graphs]
        for i, (backend, graph) in enumerate(runs):
            advance = partial(_advance, progress, i * len(shapes), len(runs) * len(shapes))
            advance(0)
            own = [e for e in compiled.engines if (e.backend, e.graph) == (backend.name, graph)]
            pair = {engine.twin: engine for engine in own}
            graph_inputs = read_inputs(bundle.root / pair["dense"].onnx)
            # The encoder of two may hear recordings, which have no sequence.
            own_shapes = fitted.shapes(images="sequence" not in dynamic_names(graph_inputs))
            try:
                rows += measure_latency(
                    backend,
                    bundle.root,
                    pair["dense"],
                    pair["sparse"],
                    own_shapes,
                    random_feeds(graph_inputs, pair["dense"].dtype, vocabulary),
                    recipe.limits.max_slowdown,
                    after_shape=advance,
                )
            except BackendMissingError as error:
                # Built for another machine; the report says so by name.
                not_measured.append(NotMeasured(backend.name, str(error)))
        progress("bench", len(runs) * len(shapes), len(runs) * len(shapes))
        seconds = time.perf_counter() - began
        missing = tuple(dict.fromkeys(not_measured))
        return BenchResult(tuple(rows), conditions(), seconds, missing)

    return bundle.stage("bench", BenchResult, inputs, [], run)


def _engine_folder(backend: Backend, twin: Twin, model: OnnxModel) -> Path:
    folder = Path("engines") / backend.name / twin
    return folder if model.graph == "model" else folder / model.graph


def _evidence(
    bundle: Bundle,
    backend: Backend,
    engines: Sequence[Engine],
    sparsity: tuple[TensorCheck, ...],
) -> list[EngineEvidence]:
    """What a backend did with each graph; a weight belongs to the graph of its block."""
    parts = {part.graph: f"{part.blocks}." for part in recipe_of(bundle).parts}
    found = []
    for engine in engines:
        if (engine.backend, engine.twin) == (backend.name, "sparse"):
            prefix = parts[engine.graph] if len(parts) > 1 else ""
            own = tuple(check for check in sparsity if check.module.startswith(prefix))
            evidence = backend.evidence(bundle.root, engine, own)
            found.append(replace(evidence, graph=engine.graph))
    return found


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress("bench", before + done, total)
