"""The stage that times dense against sparse engines."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from prox24_deploy.bundle.bundle import Bundle
from prox24_deploy.bundle.environment import machine, versions
from prox24_deploy.bundle.layout import ENGINES, ONNX
from prox24_deploy.bundle.stage import Artifact, Stage, Workspace
from prox24_deploy.config.options import BenchOptions, EngineOptions
from prox24_deploy.config.recipe import dynamic_names
from prox24_deploy.core.errors import BackendMissingError
from prox24_deploy.core.fingerprint import unkeyed
from prox24_deploy.core.host import free_memory, gib_free, gib_needed
from prox24_deploy.core.records import (
    BenchResult,
    CompileResult,
    Engine,
    LatencyRow,
    NotMeasured,
)
from prox24_deploy.core.shapes import Shape
from prox24_deploy.core.types import Progress
from prox24_deploy.engines.base import Backend
from prox24_deploy.engines.feeds import random_feeds
from prox24_deploy.latency.measure import (
    DEFAULT_OPTIONS,
    MeasureOptions,
    conditions,
    latency_verdict,
    measure_latency,
)
from prox24_deploy.pipeline.context import ModelContext, fitted_shapes, vocabulary_of
from prox24_deploy.pipeline.stages.quantize import quantized_of
from prox24_deploy.pipeline.stages.recover import shipped_of


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchInputs:
    """What the latencies depend on."""

    engines: tuple[Engine, ...]
    compiled: Artifact
    onnx: Artifact
    pruned: Artifact
    quantized: Artifact | None
    backends: tuple[Backend, ...]
    batches: tuple[int, ...]
    sequences: tuple[int, ...]
    pasts: tuple[int, ...]
    images: bool
    cached: bool
    vocabulary: int
    max_slowdown: float = field(metadata=unkeyed("rows are judged again whenever they are read"))
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    measure: MeasureOptions = DEFAULT_OPTIONS

    def shapes(self, *, images: bool, cached: bool) -> list[Shape]:
        """Every shape to measure; sequence 0 for a graph that has no such axis."""
        options = EngineOptions(batches=self.batches, sequences=self.sequences, pasts=self.pasts)
        return options.shapes(images=images, cached=cached)


def measured_for(asked: BenchOptions) -> MeasureOptions:
    """How to measure what a user asked for."""
    if asked.rounds is not None:
        return MeasureOptions(min_rounds=asked.rounds, max_rounds=asked.rounds, warmup=asked.warmup)
    return MeasureOptions(warmup=asked.warmup, seconds=asked.seconds or DEFAULT_OPTIONS.seconds)


def run(
    bundle: Bundle,
    model: ModelContext,
    compiled: CompileResult,
    backends: Sequence[Backend],
    options: EngineOptions,
    progress: Progress,
    *,
    measure: MeasureOptions = DEFAULT_OPTIONS,
    anew: bool = False,
) -> BenchResult:
    """Time dense against sparse with every backend at every shape."""
    fitted = fitted_shapes(options, model.config, model.recipe)
    inputs = BenchInputs(
        engines=compiled.engines,
        compiled=bundle.artifact(ENGINES),
        onnx=bundle.artifact(ONNX),
        pruned=shipped_of(bundle),
        quantized=quantized_of(bundle),
        backends=tuple(backends),
        batches=fitted.batches,
        sequences=fitted.sequences,
        pasts=fitted.pasts,
        images=not model.recipe.modality.has_length,
        cached=any(part.cache for part in model.recipe.parts),
        vocabulary=vocabulary_of(model.config),
        max_slowdown=model.recipe.limits.max_slowdown,
        machine=machine(),
        versions=versions(),
        measure=measure,
    )
    found = bundle.run(STAGE, inputs, progress, anew=anew)
    rows = tuple(_judged(row, model.recipe.limits.max_slowdown) for row in found.latency)
    return replace(found, latency=rows)


def _judged(row: LatencyRow, limit: float) -> LatencyRow:
    return replace(row, limit=limit, verdict=latency_verdict(row.speedup, limit))


def _bench(inputs: BenchInputs, work: Workspace, progress: Progress) -> BenchResult:
    began = time.perf_counter()
    rows: list[LatencyRow] = []
    missing: list[NotMeasured] = []
    shapes = len(inputs.shapes(images=inputs.images, cached=inputs.cached))
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
    _require_room(backend, list(pair.values()))
    graph_inputs = read_inputs(root / pair["dense"].onnx)
    axes = dynamic_names(graph_inputs)
    return measure_latency(
        backend,
        root,
        pair["dense"],
        pair["sparse"],
        # The encoder of two may hear recordings, which have no sequence.
        inputs.shapes(images="sequence" not in axes, cached="past" in axes),
        random_feeds(graph_inputs, pair["dense"].dtype, inputs.vocabulary),
        inputs.max_slowdown,
        options=inputs.measure,
        after_shape=advance,
    )


def _require_room(backend: Backend, engines: Sequence[Engine]) -> None:
    """Refuse to time engines on the CPU that do not fit beside each other into its memory.

    They run in turns, so that both have to be there; and the disk must not be timed.
    """
    if backend.on_gpu:
        return
    # Whatever a file holds, the CPU computes in float32; 8-bit weights stand for as many values.
    needed = len(engines) * max(
        engine.size_bytes * (1 if engine.dtype == "float32" else 2) for engine in engines
    )
    if (free := free_memory()) < needed:
        raise BackendMissingError(
            f"The engines of {backend.name} take about {gib_needed(needed)} of memory together, "
            f"which they must to be timed in turns, and {gib_free(free)} are free; free some, or "
            "build for a GPU with --backend."
        )


STAGE = Stage(name="bench", result=BenchResult, run=_bench)


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress("bench", before + done, total)
