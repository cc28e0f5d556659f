"""The stages of a build on engines: compile them, and time dense against sparse."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import ENGINES, ONNX, PRUNED
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import EngineOptions
from prox24_deploy.config.recipe import Recipe, dynamic_names
from prox24_deploy.core.errors import BackendMissingError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.records import (
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
from prox24_deploy.core.types import TWINS, Progress, Twin
from prox24_deploy.engines import Origin, backend_by_name
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.latency.measure import conditions, latency_verdict, measure_latency
from prox24_deploy.pipeline.context import fitted_shapes, vocabulary_of

if TYPE_CHECKING:
    from prox24_deploy.engines.cusparselt.profile import GpuProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileInputs:
    """What the engines and the evidence about them depend on.

    `blocks` has the prefix of the modules of each graph, and `devices` what each backend builds on
    or for.
    """

    dense: tuple[OnnxModel, ...]
    sparse: tuple[OnnxModel, ...]
    sparsity: tuple[TensorCheck, ...]
    onnx: Artifact
    pruned: Artifact
    blocks: Mapping[str, str]
    backends: tuple[Backend, ...]
    devices: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchInputs:
    """What the latencies depend on."""

    engines: tuple[Engine, ...]
    compiled: Artifact
    onnx: Artifact
    pruned: Artifact
    backends: tuple[Backend, ...]
    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    images: bool
    vocabulary: int
    max_slowdown: float = field(metadata=unkeyed("rows are judged again whenever they are read"))
    machine: Mapping[str, str]
    versions: Mapping[str, str]

    def shapes(self, *, images: bool) -> list[tuple[int, int]]:
        """Every (batch, sequence) to measure; sequence 0 for a graph that has no such axis."""
        options = EngineOptions(batches=self.batches, sequences=self.sequences)
        return options.shapes(images=images)


def open_backends(
    options: EngineOptions,
    dense: Path,
    dense_sha256: str,
    recipe: Recipe,
    config: dict[str, object],
) -> tuple[Backend, ...]:
    """The backends asked for, each once.

    Args:
        options: names the backends and the shapes.
        dense: the dense model directory.
        dense_sha256: its hash.
        recipe: that fits the model.
        config: of the model.

    Raises:
        BackendMissingError: one is not available here.
    """
    fitted = fitted_shapes(options, config, recipe)
    origin = Origin(
        dense=dense, dense_sha256=dense_sha256, recipe=recipe, gemms=planned_gemms(options.plan)
    )
    backends = (backend_by_name(name, fitted, origin) for name in options.backends)
    return tuple({backend.name: backend for backend in backends}.values())


def planned_gemms(plan: Path | None) -> "GpuProfile | None":
    """The GEMM timings that a plan was made from.

    Raises:
        UsageError: the file is no plan.
    """
    if plan is None:
        return None
    from prox24_deploy.engines.cusparselt.planning import read_plan

    return read_plan(plan).profile


def compile_engines(
    bundle: Bundle,
    exported: ExportResult,
    recipe: Recipe,
    backends: Sequence[Backend],
    progress: Progress,
) -> CompileResult:
    """Compile both twins with every backend into `engines/BACKEND/TWIN/`.

    Encoder and decoder get a folder each in there.
    """
    parts = recipe.parts
    inputs = CompileInputs(
        dense=exported.dense,
        sparse=exported.sparse,
        sparsity=exported.sparsity,
        onnx=bundle.artifact(ONNX),
        pruned=bundle.artifact(PRUNED),
        blocks={part.graph: f"{part.blocks}." if len(parts) > 1 else "" for part in parts},
        backends=tuple(backends),
        devices=tuple(backend.device() for backend in backends),
        versions=versions(),
    )
    return bundle.run(COMPILE, inputs, progress)


def bench(
    bundle: Bundle,
    compiled: CompileResult,
    backends: Sequence[Backend],
    options: EngineOptions,
    recipe: Recipe,
    config: dict[str, object],
    progress: Progress,
    *,
    anew: bool = False,
) -> BenchResult:
    """Time dense against sparse with every backend at every shape."""
    fitted = fitted_shapes(options, config, recipe)
    inputs = BenchInputs(
        engines=compiled.engines,
        compiled=bundle.artifact(ENGINES),
        onnx=bundle.artifact(ONNX),
        pruned=bundle.artifact(PRUNED),
        backends=tuple(backends),
        batches=fitted.batches,
        sequences=fitted.sequences,
        images=not recipe.modality.has_length,
        vocabulary=vocabulary_of(config),
        max_slowdown=recipe.limits.max_slowdown,
        machine=machine(),
        versions=versions(),
    )
    found = bundle.run(BENCH, inputs, progress, anew=anew)
    rows = tuple(_judged(row, recipe.limits.max_slowdown) for row in found.latency)
    return replace(found, latency=rows)


def _judged(row: LatencyRow, limit: float) -> LatencyRow:
    return replace(row, limit=limit, verdict=latency_verdict(row.speedup, limit))


def _run_compile(inputs: CompileInputs, work: Workspace, progress: Progress) -> CompileResult:
    began = time.perf_counter()
    engines: list[Engine] = []
    evidence: list[EngineEvidence] = []
    total = 2 * len(inputs.backends)
    for i, backend in enumerate(inputs.backends):
        for j, twin in enumerate(TWINS):
            progress("compile", 2 * i + j, total)
            for model in inputs.dense if twin == "dense" else inputs.sparse:
                out = _engine_folder(backend, twin, model)
                engines.append(backend.build(work.root, model, out, twin=twin))
        evidence += _evidence(inputs, work.root, backend, engines)
    progress("compile", total, total)
    return CompileResult(
        engines=tuple(engines), evidence=tuple(evidence), seconds=time.perf_counter() - began
    )


def _run_bench(inputs: BenchInputs, work: Workspace, progress: Progress) -> BenchResult:
    began = time.perf_counter()
    rows: list[LatencyRow] = []
    missing: list[NotMeasured] = []
    shapes = len(inputs.shapes(images=inputs.images))
    graphs = list(dict.fromkeys(engine.graph for engine in inputs.engines))
    runs = [(backend, graph) for backend in inputs.backends for graph in graphs]
    for i, (backend, graph) in enumerate(runs):
        advance = partial(_advance, progress, i * shapes, len(runs) * shapes)
        advance(0)
        try:
            rows += _time_graph(inputs, work.root, backend, graph, advance)
        except BackendMissingError as error:
            # Built for another machine; the report says so by name.
            missing.append(NotMeasured(backend=backend.name, reason=str(error)))
    progress("bench", len(runs) * shapes, len(runs) * shapes)
    seconds = time.perf_counter() - began
    return BenchResult(
        latency=tuple(rows),
        conditions=conditions(),
        seconds=seconds,
        not_measured=tuple(dict.fromkeys(missing)),
    )


def _time_graph(
    inputs: BenchInputs,
    root: Path,
    backend: Backend,
    graph: str,
    advance: Callable[[int], None],
) -> tuple[LatencyRow, ...]:
    """Time both twins of one graph with one backend."""
    from prox24_deploy.graph.export.signature import read_inputs

    own = [e for e in inputs.engines if (e.backend, e.graph) == (backend.name, graph)]
    pair = {engine.twin: engine for engine in own}
    graph_inputs = read_inputs(root / pair["dense"].onnx)
    return measure_latency(
        backend,
        root,
        pair["dense"],
        pair["sparse"],
        # The encoder of two may hear recordings, which have no sequence.
        inputs.shapes(images="sequence" not in dynamic_names(graph_inputs)),
        random_feeds(graph_inputs, pair["dense"].dtype, inputs.vocabulary),
        inputs.max_slowdown,
        after_shape=advance,
    )


COMPILE = Stage(name="compile", result=CompileResult, run=_run_compile, outputs=(ENGINES,))
BENCH = Stage(name="bench", result=BenchResult, run=_run_bench)


def _engine_folder(backend: Backend, twin: Twin, model: OnnxModel) -> Path:
    folder = Path(ENGINES) / backend.name / twin
    return folder if model.graph == "model" else folder / model.graph


def _evidence(
    inputs: CompileInputs, root: Path, backend: Backend, engines: Sequence[Engine]
) -> list[EngineEvidence]:
    """What a backend did with each graph; a weight belongs to the graph of its block."""
    found = []
    for engine in engines:
        if (engine.backend, engine.twin) == (backend.name, "sparse"):
            prefix = inputs.blocks[engine.graph]
            own = tuple(c for c in inputs.sparsity if c.module.startswith(prefix))
            evidence = backend.evidence(root, engine, own)
            found.append(replace(evidence, graph=engine.graph))
    return found


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress("bench", before + done, total)
